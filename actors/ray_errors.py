"""What Ray raises, as words and as the exception that was raised on the other side."""

from __future__ import annotations

import re

from ray.exceptions import RayTaskError

from merge_core.errors import RaymeldError

_COLOUR = re.compile("\x1b\\[[0-9;]*m")
"""Ray colours its messages, whoever reads them."""


def cause_of(error: RayTaskError) -> Exception:
    """The exception that the actor raised, as it was there."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else RaymeldError(first_line(error))


def first_line(error: Exception | None) -> str:
    """The first line of what it says, or its type.

    Of an actor that could not be made the last: below the traceback stands what was raised.
    """
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1 if getattr(error, "actor_init_failed", False) else 0]
