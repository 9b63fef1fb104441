"""How long the fault programs run: `MINI_STUDIO_TEST_LENGTH` is `short` (the default, as CI runs them) or `full`."""

import os


def length(*, short: float, full: float) -> float:
    """The one of the two that was asked for."""
    return {"short": short, "full": full}[os.environ.get("MINI_STUDIO_TEST_LENGTH", "short")]
