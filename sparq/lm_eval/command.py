"""`sparq lm-eval`: the harness's own command, which then also knows the model `sparq`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run `lm_eval` with `arguments`, as it would run them.

    Raises:
        ModuleNotFoundError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("sparq lm-eval needs lm-evaluation-harness: pip install 'sparq-attention[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import sparq.lm_eval.model  # noqa: F401  registers it: the harness looks for no models of others

    own, sys.argv = sys.argv, ["lm-eval", *arguments]  # where the harness reads them
    try:
        cli_evaluate()
    finally:
        sys.argv = own
    return 0
