"""The actor that checks: verifies one file at a time, and says how far it is."""

from __future__ import annotations

import logging
import socket

import ray

from actors.greeting import greet
from actors.identity import Signed
from merge_core.memory import Memory, free_host_memory
from merge_core.verify import FileCheck, FileResult, check_file

_log = logging.getLogger(__name__)


class Checker:
    """A worker of a verification. Plain class: the pool makes an actor of it."""

    def __init__(self, device: str, name: str) -> None:
        self._device, self._name = device, name
        self._doing, self._done, self._size = "starting", 0, 0

    def hello(self) -> Signed:
        """Who this is, and what it found: a ``Greeting``."""
        self._begin("idle", 0)
        found = Memory(host=free_host_memory(), device=None)
        return greet(self._device, found, "reads files back")

    def check(self, check: FileCheck) -> FileResult:
        """Verify one file of the result."""
        self._begin(f"reading back {check.file.name}", 0)
        try:
            result = check_file(check)
        finally:
            self._begin("idle", 0)
        said = {"out": str(check.file.parent), "done": result.bytes_read, "seconds": result.seconds}
        _log.info("read back %s", check.file.name, extra={"phase": "verifying", **said})
        return result

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def status(self) -> tuple[str, str, int, int]:
        """Device, doing what, bytes done, bytes of that; answers while another method runs."""
        return f"{self._device} on {socket.gethostname()}", self._doing, self._done, self._size

    def _begin(self, doing: str, size: int) -> None:
        self._doing, self._done, self._size = doing, 0, size
