"""What a plan is asked for, apart from the base and the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.adapter import Adapter, parse_adapter
from merge_core.checkpoint import Decode
from merge_core.combining import check_combination
from merge_core.device_map import DeviceMap, read_device_map
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.folders import pinned
from merge_core.layout import DTYPE_NAMES
from merge_core.quantised import read_packed
from merge_core.simulated import round_to_nf4
from merge_core.stores.location import Access, Location
from merge_core.updates.combined import Combination


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """See ``planner.make_plan``."""

    adapter_name: str | None
    tokenizer: str | None
    dtype: str | None
    shard_bytes: int
    device_map: Path | None
    keep_tied: bool
    combination: Combination
    layers: str | None
    dequantize: bool
    simulate_nf4: bool
    access: Access

    def check(self, adapters: int) -> None:
        """Raise InputError with everything that is wrong without a look at any file.

        Args:
            adapters: how many there are.
        """
        problems = []
        if not adapters:
            problems.append(Problem("no adapter given", "ADAPTER", "Name at least one adapter"))
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            what = f"{self.dtype!r} is no dtype to merge into"
            problems.append(Problem(what, "--dtype", f"Use one of {', '.join(DTYPE_NAMES)}"))
        if self.shard_bytes < 1:
            what = f"{self.shard_bytes} bytes hold no tensor"
            problems.append(Problem(what, "--shard-size", "Give a size such as 2GB"))
        with gathered(problems):
            check_combination(self.combination, adapters)
        if problems:
            raise InputError(problems)

    def decode(self) -> Decode | None:
        """What finds the weights of the base that are not taken as they are."""
        if self.dequantize and self.simulate_nf4:
            what = "a base is quantised, or is rounded as if it had been: one of the two"
            raise refuse(what, "--dequantize --simulate-nf4", "Leave --simulate-nf4 out")
        if self.dequantize:
            return read_packed
        return round_to_nf4 if self.simulate_nf4 else None

    def devices(self) -> DeviceMap | None:
        """What the device map says, if there is one."""
        return None if self.device_map is None else read_device_map(self.device_map.absolute())

    def recipe(self, base: Location, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """What the same merge is made from again: by the names that recipes have for it.

        ``layers`` and ``cache`` are left out: what is made now and what later changes no byte, nor
        does what a node keeps. How an S3 is reached is said where something is read from one.
        """
        how = self.combination
        tokenizer = self.tokenizer
        if tokenizer not in (None, "base"):
            tokenizer = str(pinned(parse_adapter(tokenizer, self.access)[0]))
        on_s3 = any(place.scheme == "s3" for place in (base, *(one.given for one in adapters)))
        access = asdict(self.access) if on_s3 else {}
        access.pop("cache", None)
        said: dict[str, Any] = {
            "adapter_name": self.adapter_name,
            "tokenizer": tokenizer,
            "dtype": None if self.dtype is None else str(self.dtype),
            "shard_size": str(self.shard_bytes),
            "device_map": None if self.device_map is None else str(self.device_map.absolute()),
            "keep_tied": self.keep_tied or None,
            "combine": how.method,
            "density": how.density,
            "majority_sign": how.majority_sign,
            "seed": how.seed,
            "dequantize": self.dequantize or None,
            "simulate_nf4": self.simulate_nf4 or None,
            **{name: value or None for name, value in access.items()},
        }
        return {
            "base": str(base),
            "adapters": [{"path": str(one.given), "weight": one.weight} for one in adapters],
            **{name: value for name, value in said.items() if value is not None},
        }
