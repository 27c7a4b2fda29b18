"""The options of every command that makes a plan, and the plan that they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from cluster.options import (
    AdapterName,
    Combine,
    Density,
    Dequantize,
    DeviceMapFile,
    DtypeOption,
    KeepTied,
    Layers,
    MajoritySign,
    Seed,
    ShardSize,
    SimulateNf4,
    Tokenizer,
    Words,
    size_in_bytes,
)
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.trainer_output import split_words
from merge_core.updates.combined import Combination


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is merged into what, and how."""

    words: Words
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

    def plan(self) -> MergePlan:
        """See ``make_plan``."""
        base, adapters = split_words(self.words)
        return make_plan(
            base,
            adapters,
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


def with_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer is to see it, which reads options off a signature: with those above in
    the place of its parameter ``asked``.
    """
    hints = get_type_hints(PlanOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(PlanOptions)
    ]
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [parameter.name for parameter in own].index("asked")

    def called(**given: Any) -> None:
        asked = PlanOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(asked=asked, **given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {}
    signature = inspect.Signature([*own[:place], *shared, *own[place + 1 :]])
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called
