"""An OpenAI-compatible server: transformers' own, around one model with SparQ, which keeps the last conversations.

It needs transformers' extra `serving` (`pip install 'sparq-attention[serving]'`); `sparq serve` is its command.
"""

from importlib.util import find_spec

from transformers.utils.import_utils import is_serve_available

if not is_serve_available() or find_spec("prometheus_client") is None:
    raise ImportError("the server needs more packages: pip install 'sparq-attention[serving]'")

from sparq.serving.app import build, run

__all__ = ["build", "run"]
