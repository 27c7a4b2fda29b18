"""The inode of a local file, where it tells that another file has taken its place.

A link that is switched to another model, or a copy that keeps its times, may leave size and time as
they were: archives and images often have one time for all that is in them. The number of the inode
is another one then. But it is the file's own only on the mount where it was taken. Another node of
a cluster may have a copy under the same path, with the same times, which is as good; and a merge
that goes on elsewhere must find its inputs unchanged. So it is never part of a pin, and compared on
the same machine, boot and device alone. And not on every file system: those in user space, SMB and
layered ones give the same file another number once the kernel has forgotten it, which would end a
merge for nothing.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

KEEPS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "zfs", "f2fs", "tmpfs", "nfs", "nfs4", "lustre", "gpfs", "ceph")
)
"""File systems whose numbers are those of the files, for as long as there are any."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOUNTS = Path("/proc/self/mountinfo")


def inode_of(status: os.stat_result) -> str:
    """Machine and device, then the number; empty where there is none to go by."""
    if file_system_of(status) not in KEEPS:
        return ""
    return f"{_boot()} {_device(status)} {status.st_ino}"


def file_system_of(status: os.stat_result) -> str | None:
    """The kind of file system that a file lies on; None where the kernel does not say."""
    return _file_system(_device(status))


def differ(one: str, other: str) -> bool:
    """Whether two such inodes are of one place, and not the same."""
    return one.rpartition(" ")[0] == other.rpartition(" ")[0] and one != other


def _device(status: os.stat_result) -> str:
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


@functools.cache
def _boot() -> str:
    return _BOOT.read_text().strip()


@functools.lru_cache(maxsize=64)
def _file_system(device: str) -> str | None:
    """The kind of what is mounted from a device; None where the kernel does not say."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:  # no Linux
        return None
    kinds = {fields[2]: fields[fields.index("-") + 1] for fields in mounts}
    return kinds.get(device)
