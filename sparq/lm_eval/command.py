"""`sparq lm-eval`: the harness's own command, which then also knows the model `sparq`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run `lm_eval` with `arguments`, as it would run them; returns the exit status.

    Raises:
        ImportError: the harness, or something it needs, is not installed.
    """
    own, sys.argv = sys.argv, ["lm-eval", *arguments]  # where the harness reads them
    try:
        from lm_eval.__main__ import cli_evaluate

        import sparq.lm_eval.model  # noqa: F401  registers it: the harness looks for no models of others

        cli_evaluate()
    except ImportError as error:  # also in the middle: the harness imports some of what it needs when it needs it
        raise ImportError(f"lm-eval: {error}; the harness comes with pip install 'sparq-attention[eval]'") from error
    finally:
        sys.argv = own
    return 0
