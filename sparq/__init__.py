"""SparQ Attention (arXiv 2312.04985) for Hugging Face models.

`sparq.patch(model)` makes decoding read less of the KV cache.
"""

from sparq.versions import check_versions
from sparq_command import version

check_versions()

import sparq.implementation  # noqa: E402  makes attn_implementation="sparq" known to transformers
import sparq.pipeline  # noqa: E402, F401  likewise pipeline("sparq-text-generation")
from sparq.config import SparqConfig  # noqa: E402
from sparq.patching import is_patched, patch, patched, record, report, unpatch  # noqa: E402
from sparq.prompt_cache import load_cache, save_cache  # noqa: E402
from sparq.questions import answer  # noqa: E402
from sparq.recording import Recording  # noqa: E402
from sparq.reporting import Report  # noqa: E402

__version__ = version()

__all__ = [
    "Recording",
    "Report",
    "SparqConfig",
    "__version__",
    "answer",
    "is_patched",
    "load_cache",
    "patch",
    "patched",
    "record",
    "report",
    "save_cache",
    "unpatch",
]
