"""Methods that SparQ is compared with, in plain PyTorch: for quality and bytes, not for speed."""

from sparq.lm_eval.methods.h2o import H2O, H2OLayer
from sparq.lm_eval.methods.method import Attended, Method
from sparq.lm_eval.methods.oracle import Oracle
from sparq.lm_eval.methods.pages import Pages
from sparq.lm_eval.methods.quest import Quest
from sparq.lm_eval.methods.rocket import Rocket
from sparq.lm_eval.methods.sparq_variant import SparqVariant
from sparq.lm_eval.methods.window import Window

__all__ = ["H2O", "Attended", "H2OLayer", "Method", "Oracle", "Pages", "Quest", "Rocket", "SparqVariant", "Window"]
