"""A merge onto a hub on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from handmade import TWO_LANES
from hub_server import Hub

from merge_core.merge import MergeResult, merge
from merge_core.plan import MergePlan
from merge_core.stores.location import Location, Upload, locate, onto_hub

SHARDS = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]


class Target:
    """A model on the hub, the state of a merge that goes there, and its scratch."""

    def __init__(self, folder: Path, hub: Hub, plan: MergePlan) -> None:
        self.hub, self.plan = hub, plan
        self.state, self.scratch = folder / "state", folder / "scratch"
        upload = Upload(state=locate(self.state), scratch=str(self.scratch))
        self.out: Location = onto_hub(locate("hf://me/merge"), upload)

    def merge(self, **how: Any) -> MergeResult:
        return merge(self.plan, self.out, device="cpu", choice=TWO_LANES, **how)

    def waiting(self) -> list[Path]:
        """Files that are not sent."""
        return list(self.scratch.glob("*.raymeld-part"))

    def limit(self, nbytes: int) -> None:
        """So many may wait at a time."""
        assert self.out.upload is not None
        self.out = replace(self.out, upload=replace(self.out.upload, scratch_limit=nbytes))
