"""The options of every command that makes a plan, and the plan that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.options import (
    AdapterName,
    Anonymous,
    Cache,
    Combine,
    Density,
    Dequantize,
    DeviceMapFile,
    DtypeOption,
    EndpointUrl,
    KeepTied,
    Layers,
    MajoritySign,
    Region,
    Seed,
    ShardSize,
    SimulateNf4,
    Tokenizer,
    size_in_bytes,
)
from merge_core.adapter import AdapterWord
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores.location import Access, Place
from merge_core.updates.combined import Combination


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is merged into what, and how."""

    adapter_name: AdapterName = None
    tokenizer: Tokenizer = None
    dtype: DtypeOption = None
    shard_size: ShardSize = "2GB"
    device_map: DeviceMapFile = None
    keep_tied: KeepTied = False
    combine: Combine = None
    density: Density = None
    majority_sign: MajoritySign = None
    seed: Seed = None
    layers: Layers = None
    dequantize: Dequantize = False
    simulate_nf4: SimulateNf4 = False
    endpoint_url: EndpointUrl = None
    region: Region = None
    anonymous: Anonymous = False
    cache: Cache = False

    @property
    def access(self) -> Access:
        """How the stores are reached."""
        return Access(
            endpoint_url=self.endpoint_url,
            region=self.region,
            anonymous=self.anonymous,
            cache=self.cache,
        )

    def plan(self, base: Place | None, adapters: Sequence[AdapterWord]) -> MergePlan:
        """See ``make_plan``."""
        return make_plan(
            base,
            adapters,
            access=self.access,
            adapter_name=self.adapter_name,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            shard_bytes=size_in_bytes(self.shard_size),
            device_map=self.device_map,
            keep_tied=self.keep_tied,
            combination=Combination(
                method=self.combine or "sum",
                density=self.density,
                majority_sign=self.majority_sign,
                seed=self.seed,
            ),
            layers=self.layers,
            dequantize=self.dequantize,
            simulate_nf4=self.simulate_nf4,
        )
