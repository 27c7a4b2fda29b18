"""The most memory that this process took at once, of the machine and of its GPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

_RESET_PEAK = "5"
"""What proc(5) has written there to set the peak back to what is resident now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The most that was taken at once, in bytes."""

    memory: int
    """Resident, by the whole process. Its largest ever where the system cannot start anew."""
    vram: int | None
    """Reserved by torch, without the CUDA context; None where no GPU is used."""

    @classmethod
    def start(cls, device: str) -> None:
        """Begin anew.

        Args:
            device: ``cpu`` or ``cuda``.
        """
        with contextlib.suppress(OSError):  # no Linux, or a container without a writable /proc
            _CLEAR.write_text(_RESET_PEAK)
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    @classmethod
    def since_start(cls, device: str) -> Self:
        """What was taken since ``start``."""
        if device != "cuda":
            return cls(memory=_resident_peak(), vram=None)
        import torch

        return cls(memory=_resident_peak(), vram=torch.cuda.max_memory_reserved())


def resident() -> int:
    """Bytes of memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _resident_peak() -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
