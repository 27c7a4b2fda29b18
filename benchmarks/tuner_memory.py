"""Measure what a layer takes in memory while PEFT merges it, beside what is planned. Linux only.

    export MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 PYTHONPATH=tests
    python -m benchmarks.tuner_memory [TYPE ...]

For each tuner and shape of a layer, of a small model with layers as large as a 0.5B's: the growth
of the process's largest resident set, and what ``merge_core.peft_tuners`` has planned for, which
should be more, and not much more. With the threshold every large array is mapped by itself, so
that its memory is given back at once. The adapters are those of the tests.
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from models import make_base
from safetensors.torch import load_file
from tuners import CONFIGS, make_tuned

from merge_core.memory import alone_bytes
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.updates import PeftUpdate
from merge_core.updates.peft_layer import merge_layer

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    kinds = sys.argv[1:] or [kind for kind in CONFIGS if kind != "LN_TUNING"]
    with tempfile.TemporaryDirectory() as directory:
        base = make_base(Path(directory) / "base", **SHAPE)
        print(f"{'type':<12} {'shape':<13} measured  planned, MB")
        for kind in kinds:
            adapter = make_tuned(Path(directory) / kind, base, kind)
            for line in lines(make_plan(base, [adapter]), base, adapter):
                print(f"{kind:<12} {line}", flush=True)


def lines(plan: MergePlan, base: Path, adapter: Path) -> Iterator[str]:
    """One a shape of a layer."""
    weights, seen = load_file(base / "model.safetensors"), set()
    saved = load_file(adapter / "adapter_model.safetensors")
    for update in (update for task in plan.tasks for update in task.updates):
        if not isinstance(update, PeftUpdate) or update.layer.shape in seen:
            continue
        seen.add(update.layer.shape)
        merge(plan, update, saved, weights)  # what is loaded once is not of a layer
        grown = growth(functools.partial(merge, plan, update, saved, weights))
        planned = alone_bytes(update, plan) + 4 * update.elements
        shape = " x ".join(map(str, update.layer.shape))
        yield f"{shape:<13} {grown / 1e6:8.0f} {planned / 1e6:8.0f}" + " !" * (grown > planned)


State = dict[str, torch.Tensor]


def merge(plan: MergePlan, update: PeftUpdate, saved: State, weights: State) -> object:
    """As a worker does it."""
    tuning, layer = plan.adapters[0].tuning, update.layer
    assert tuning is not None
    held = {t.name: saved[t.name].clone() for t in (*update.tensors, *tuning.shared)}
    parts = ("weight", "bias") if layer.bias else ("weight",)
    base = {part: weights[f"{layer.path}.{part}"].float() for part in parts}
    return merge_layer(tuning, layer, held, base, plan.adapters[0].path)


def growth(work: Callable[[], object]) -> int:
    """Bytes that the resident set grew by at most."""
    RESET.write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
