"""A disk of its own in a file, which can lose its power. Needs root and Linux."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, see the kernel's fs/ext4/ext4.h."""

_LOSE_THE_LOG = (2).to_bytes(4, "little")
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what the journal has not committed yet is gone, too."""


class SmallDisk:
    """An ext4 of some megabytes, mounted at ``path``."""

    def __init__(self, image: Path, path: Path) -> None:
        self.path, self._image = path, image

    def lose_power(self) -> None:
        """Whatever was not made durable is gone; until ``restart`` every write fails."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _LOSE_THE_LOG)
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """Mount what is left, as a machine does that starts anew."""
        self._unmount()
        self._mount()

    def fill(self, ballast: Path) -> None:
        """Have a file there take all that is free."""
        for size in (1 << 20, 1 << 10):
            with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())  # or what is free is only promised

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.path], check=True)

    def _unmount(self) -> None:
        subprocess.run(["umount", self.path], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[SmallDisk]:
    """Made and mounted in ``folder``.

    Raises:
        PermissionError: this user may not mount, or there is no such thing here.
    """
    image, path = folder / "disk.img", folder / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    disk = SmallDisk(image, path)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError("no disk can be mounted here") from error
    try:
        yield disk
    finally:
        disk._unmount()
        image.unlink()
