"""A worker's first answer: who it is, where, on what, and what it found there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from actors.identity import Identity, Signed, identify, sign
from merge_core.memory import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What ``hello()`` returns, signed."""

    identity: Identity
    device: str
    """``cpu``, or the GPU's name."""
    memory: Memory
    """Free, before the first item."""
    choice: str
    """What the worker chose to do with it, and why."""
    node: str
    """Ray's id of it, in hexadecimal digits."""
    visible_gpus: str | None
    """CUDA_VISIBLE_DEVICES as the worker has it; None: not set, so that it could see every GPU."""

    def __str__(self) -> str:
        return f"{self.device} on {self.identity.host}, process {self.identity.pid}: {self.choice}"


def greet(device: str, memory: Memory, choice: str) -> Signed:
    """The greeting of this process, which must be an actor's."""
    return sign(
        Greeting(
            identity=identify(),
            device=device,
            memory=memory,
            choice=choice,
            node=ray.get_runtime_context().get_node_id(),
            visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
    )
