"""SparQ and what it competes with in EleutherAI's lm-evaluation-harness: `sparq lm-eval --model sparq ...`.

A method of your own is a subclass of `Method`; `register_method` gives it a name.
"""

from sparq.lm_eval.methods import Attended, Method
from sparq.lm_eval.registry import register_method

__all__ = ["Attended", "Method", "register_method"]
