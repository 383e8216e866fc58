"""The CPU kernel: not compiled yet, the reference serves."""


def backend() -> str:
    return "reference"
