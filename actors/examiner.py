"""Examines the machine that it runs on; an actor on every node of a cluster, or one object here."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.identity import Identity, Signed, identify, sign
from actors.libraries import Library, find_libraries
from merge_core.memory import free_host_memory
from merge_core.nvidia import Gpu, GpuProcess, gpu_processes, list_gpus
from merge_core.reachable import (
    InputSight,
    ScratchSight,
    leave_token,
    look_at_input,
    look_at_scratch,
)
from merge_core.stores.location import Location, Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """What one process sees of the GPUs."""

    visible: str | None
    """CUDA_VISIBLE_DEVICES; None: not set, so that it sees every GPU."""
    device: str | None
    """What torch calls the first of them; None: torch can use none."""
    trouble: str | None
    """Why it can use none, in the words of torch."""
    loads: bool
    """Whether torch can be imported at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSight:
    """A GPU of the machine, and who holds memory of it."""

    gpu: Gpu
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found on one machine, its paths apart."""

    identity: Identity
    libraries: tuple[Library, ...]
    memory: int
    """Bytes free."""
    gpus: tuple[GpuSight, ...]
    """All of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    view: DeviceView
    """Of a process that was given no GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSight:
    """What was found of a merge's paths."""

    inputs: tuple[InputSight, ...]
    refusal: str | None
    """Why nothing can be written beside OUT; None if it can, or nothing was asked."""
    scratch: ScratchSight | None = None
    """Of a merge to the hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Stands for an answer that did not come."""

    reason: str
    kind: Literal["late", "waiting", "raised", "died"]
    """Late: it may still come. Waiting: for a GPU that somebody else took first. Raised: by the
    code there, mostly because that is not ours. Died: the process or its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedNode:
    """All that the driver learned of one node."""

    name: str
    examination: Examination | Identity | Silence | None = None
    """An identity: of other code, so that nothing else was read. None: it was not asked."""
    paths: PathSight | Silence | None = None
    arrived: bool = True
    """Whether the driver sees what the node wrote beside OUT."""
    ray_cpus: int = 0
    ray_gpus: int = 0
    """What Ray hands out there; without Ray, nobody does."""
    taken: int = 0
    """Of these, by others: nobody could look at them."""
    views: tuple[DeviceView | Silence, ...] = ()
    """One for each of the others: what a worker sees that was given it."""
    leaves_in: float | None = None
    """Seconds until it goes, where that has been announced; then nothing new is placed there."""


class Examiner:
    """Looks, and changes nothing but the driver's own trial folder.

    Args:
        name: unique among all examiners; of the file that this one leaves there.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def examine(self) -> Signed:
        """The machine and its software: an ``Examination``. Imports torch; takes seconds."""
        return sign(_examine())

    def look(
        self, inputs: Sequence[Location], trial: Location | None, upload: Upload | None = None
    ) -> PathSight:
        """The paths. An access to a file system whose server is gone does not return."""
        return PathSight(
            inputs=tuple(look_at_input(path) for path in inputs),
            refusal=leave_token(trial, self._name) if trial is not None else None,
            scratch=look_at_scratch(upload) if upload is not None else None,
        )

    def view_devices(self) -> DeviceView:
        """What torch sees in this process."""
        return _view_devices()


def examine_here(
    inputs: Sequence[InputSight], trial: Location | None, upload: Upload | None
) -> ExaminedNode:
    """This machine, in this process, which has looked at its inputs already."""
    refusal = leave_token(trial, "here") if trial is not None else None
    scratch = look_at_scratch(upload) if upload is not None else None
    return ExaminedNode(
        name=socket.gethostname(),
        examination=_examine(),
        paths=PathSight(inputs=tuple(inputs), refusal=refusal, scratch=scratch),
    )


def _examine() -> Examination:
    return Examination(
        identity=identify(),
        libraries=find_libraries(),
        memory=free_host_memory(),
        gpus=tuple(_look_at_gpus()),
        view=_view_devices(),
    )


def _view_devices() -> DeviceView:
    device, trouble, loads = None, None, False
    try:
        import torch

        loads = True
        torch.cuda.init()  # type: ignore[no-untyped-call] # where ``is_available`` says only no, this says why
        device = torch.cuda.get_device_name()
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        trouble = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DeviceView(
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        device=device,
        trouble=trouble,
        loads=loads,
    )


def _look_at_gpus() -> Iterator[GpuSight]:
    gpus = list_gpus()
    processes = gpu_processes() if gpus else {}
    for gpu in gpus:
        others = (one for one in processes.get(gpu.uuid, ()) if one.pid != os.getpid())
        yield GpuSight(gpu=gpu, processes=tuple(others))
