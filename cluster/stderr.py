"""stderr for people: a log that cannot be written stops no merge and changes no exit code."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console


class Stderr(Console):
    """What is printed there is lost where the disk is full or the reader has gone."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """See ``Console.print``."""
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Go on without a word; rich would end the process."""
        self.quiet = True
