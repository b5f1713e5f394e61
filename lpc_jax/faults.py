"""Which errors are told to a user in a line, and which keep their traceback.

Knows nothing of what went wrong.
"""

from __future__ import annotations

import traceback
from pathlib import Path

# The library, and the commands beside it.
_OURS = (Path(__file__).parent, Path(__file__).parents[1] / "scripts")


def is_for_user(error: Exception) -> bool:
    """Whether the library itself raised it, in words meant for the user.

    A ``ValueError`` that NumPy or JAX raised is a fault of the program: its traceback
    is what helps.
    """
    if not isinstance(error, ValueError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(folder) for folder in _OURS)
