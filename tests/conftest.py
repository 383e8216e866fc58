"""What tests in several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a real chat model."""
    import smollm2

    try:
        return smollm2.folder()
    except ImportError as error:
        pytest.skip(str(error))
