"""The plan: how the output is cut, what its fingerprint covers, and what it knows of PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from handmade import (
    INDEX,
    Geometry,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
    write_json,
)
from hypothesis import given
from hypothesis import strategies as st
from models import edit_json, qwen_config
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM

from merge_core.adapter_config import read_config
from merge_core.architecture import expected_tensors
from merge_core.factors import seal
from merge_core.peft_fields import INERT_FIELDS, READ_FIELDS
from merge_core.planner import SHARD_BYTES, make_plan
from merge_core.refused_tuners import REFUSED_VARIANTS
from merge_core.shards import OutputTensor, cut_shards

SMALL = Geometry(layers=2)
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
LARGE = Geometry(hidden=8192, inner=24576, heads=64, kv_heads=64, layers=80, vocab=152064)
"""Qwen1.5-72B."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", random_tensors(SMALL), SMALL.config)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_at(tmp_path / "adapter")


def adapter_at(path: Path, geometry: Geometry = SMALL, seed: int = 1) -> Path:
    factors = random_factors(geometry.linear, {Q: 4, K: 4}, seed=seed)
    return write_adapter(path, factors, r=4, lora_alpha=8)


EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer(n: int) -> list[str]:
    return [f"model.layers.{n}.{part}.weight" for part in "abc"]


def tensors_of(layers: int) -> list[OutputTensor]:
    """Three tensors of 8 bytes a layer, between embeddings (40), norm (4) and head (40)."""
    shapes = {EMBEDDINGS: 20, HEAD: 20, NORM: 2}
    shapes |= {name: 4 for n in range(layers) for name in layer(n)}
    return [OutputTensor(name=n, dtype="BF16", shape=(size,)) for n, size in shapes.items()]


def cut_names(layers: int, limit: int) -> list[list[str]]:
    given, turned = tensors_of(layers), tensors_of(layers)[::-1]
    assert cut_shards(given, limit) == cut_shards(turned, limit)
    return [[tensor.name for tensor in shard] for shard in cut_shards(given, limit)]


def test_shards_follow_a_forward_pass_with_layers_counted_as_numbers() -> None:
    layers = [name for n in range(12) for name in layer(n)]
    assert cut_names(12, 10**9) == [[EMBEDDINGS, *layers, NORM, HEAD]]


def test_shards_are_cut_at_layer_borders_below_the_limit() -> None:
    assert cut_names(3, 50) == [[EMBEDDINGS], [*layer(0), *layer(1)], [*layer(2), NORM], [HEAD]]
    assert cut_names(1, 64) == [[EMBEDDINGS, *layer(0)], [NORM, HEAD]]
    assert cut_names(1, 63) == [[EMBEDDINGS], [*layer(0), NORM], [HEAD]]


def test_a_layer_above_the_limit_is_a_shard_of_its_own() -> None:
    assert cut_names(2, 10) == [[EMBEDDINGS], layer(0), layer(1), [NORM], [HEAD]]


@given(layers=st.integers(0, 14), limit=st.integers(1, 200))
def test_no_cut_loses_a_tensor_or_breaks_the_limit(layers: int, limit: int) -> None:
    shards = cut_shards(tensors_of(layers), limit)
    names = sorted(tensor.name for shard in shards for tensor in shard)
    assert names == sorted(tensor.name for tensor in tensors_of(layers))
    for shard in shards:
        units = {t.name.rsplit(".", 2)[0] if ".layers." in t.name else t.name for t in shard}
        assert sum(t.nbytes for t in shard) <= limit or len(units) == 1


def test_the_limit_decides_how_many_files_the_plan_has(base: Path, adapter: Path) -> None:
    assert [s.name for s in make_plan(base, [adapter]).shards] == ["model.safetensors"]
    names = [s.name for s in make_plan(base, [adapter], shard_bytes=1).shards]
    assert names == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]


def fingerprint(
    base: Path, adapters: Sequence[str | Path], dtype: str | None = None, limit: int = SHARD_BYTES
) -> str:
    return seal(make_plan(base, adapters, dtype=dtype, shard_bytes=limit)).fingerprint


def test_the_fingerprint_knows_everything_that_changes_a_byte(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = adapter_at(tmp_path / "other", seed=2)
    alpha = shutil.copytree(adapter, tmp_path / "alpha")
    edit_json(alpha / "adapter_config.json", lora_alpha=9)
    found = [
        fingerprint(base, [adapter]),
        fingerprint(base, [other]),
        fingerprint(base, [alpha]),
        fingerprint(base, [f"{adapter}@0.5"]),
        fingerprint(base, [adapter, other]),
        fingerprint(base, [other, adapter]),  # float32 sums depend on their order
        fingerprint(base, [adapter], dtype="float16"),
        fingerprint(base, [adapter], limit=1),
    ]
    edit_json(base / "config.json", rope_theta=5.0)
    found.append(fingerprint(base, [adapter]))
    (base / "tokenizer.json").write_text("{}")
    found.append(fingerprint(base, [adapter]))
    save_file(random_tensors(SMALL, torch.float16), base / "model.safetensors", {"format": "pt"})
    found.append(fingerprint(base, [adapter]))
    assert len(set(found)) == len(found)


def test_the_fingerprint_does_not_know_where_files_lie_and_how_old_they_are(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = fingerprint(base, [adapter])
    base, adapter = base.rename(tmp_path / "moved"), adapter.rename(tmp_path / "and moved")
    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        os.utime(file, ns=(1, 1))
    assert fingerprint(base, [f"{adapter}@1.0"], dtype="bfloat16") == before


def test_a_plan_that_was_not_sealed_has_no_fingerprint(base: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match="not sealed"):
        _ = make_plan(base, [adapter]).fingerprint


def test_every_lora_field_of_the_installed_peft_is_in_one_table() -> None:
    tables = (READ_FIELDS, INERT_FIELDS, frozenset(REFUSED_VARIANTS))
    for field in dataclasses.fields(peft.LoraConfig):
        assert sum(field.name in table for table in tables) == 1, field.name
    assert sum(map(len, tables)) == len(frozenset().union(*tables))


NAMES = ["model", "layers", "0", "1", "10", "self_attn", "q_proj", "k_proj", "mlp"]
PATTERNS = [*NAMES, "self_attn.q_proj", r"layers\.1\..*", r".*\.1", "q_proj|k_proj", ".*_proj"]
PATTERNS += ["^model", "^q_proj", "[qk]_proj", "q_proj$", "0.self_attn", "proj", "", "(q|k)_proj"]


@given(
    module=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5).map(".".join),
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64), max_size=5),
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.floats(0.25, 64), max_size=5),
    rslora=st.booleans(),
)
def test_rank_and_scaling_of_a_module_are_those_that_peft_finds(
    module: str, ranks: dict[str, int], alphas: dict[str, float], rslora: bool
) -> None:
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    config = read_config({"peft_type": "LORA", "r": 8, "lora_alpha": 12, **patterns}, "here")
    rank = ranks.get(get_pattern_key(ranks.keys(), module), 8)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 12)
    assert config.resolve(module) == (rank, alpha / (math.sqrt(rank) if rslora else rank))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "intermediate_size": 40},
    ],
)
def test_the_tensors_that_a_config_asks_for_are_those_of_transformers(
    changes: dict[str, object],
) -> None:
    config = qwen_config(**changes)
    with torch.device("meta"):
        tensors = Qwen2ForCausalLM(config).state_dict()
    state = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert dict(expected_tensors(config.to_dict())) == state


def python(code: str, *words: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_imports_no_heavy_package(base: Path, adapter: Path) -> None:
    code = """if True:
        import sys
        from merge_core.planner import make_plan
        assert make_plan(sys.argv[1], [sys.argv[2]]).total_size
        heavy = {"torch", "peft", "transformers", "ray", "safetensors", "pyarrow"}
        print(sorted(heavy & sys.modules.keys()))
    """
    assert python(code, base, adapter) == "[]\n"


def test_a_merge_in_one_process_needs_no_ray(base: Path, adapter: Path, out: Path) -> None:
    code = """if True:
        import sys

        class NoRay:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "ray":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, NoRay())
        from merge_core.merge import merge
        from merge_core.planner import make_plan
        from merge_core.verify import verify

        merge(make_plan(sys.argv[1], [sys.argv[2]]), sys.argv[3], device="cpu")
        print(verify(sys.argv[3], "numeric").ok, "ray" in sys.modules)
    """
    assert python(code, base, adapter, out) == "True False\n"


def write_sparse(path: Path, geometry: Geometry) -> int:
    """A checkpoint whose tensors take no disk; returns the bytes of all headers."""
    path.mkdir()
    write_json(path / "config.json", geometry.config)
    homes, files, headers = {}, {}, 0
    for name, shape in geometry.shapes.items():
        file = (
            f"part-{name.split('.')[2]}.safetensors" if ".layers." in name else "rest.safetensors"
        )
        files.setdefault(file, {})[name] = shape
        homes[name] = file
    for file, shapes in files.items():
        entries, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        with (path / file).open("wb") as sparse:
            sparse.write(len(text).to_bytes(8, "little") + text)
            sparse.truncate(8 + len(text) + end)
        headers += 8 + len(text)
    write_json(path / INDEX, {"weight_map": homes})
    return headers + (path / INDEX).stat().st_size


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux does")
def test_a_72b_is_planned_from_its_headers_alone(tmp_path: Path) -> None:
    headers = write_sparse(tmp_path / "large", LARGE)
    adapter = adapter_at(tmp_path / "adapter", LARGE)
    before = bytes_read()
    plan = make_plan(tmp_path / "large", [adapter])
    assert bytes_read() - before < headers + 1_000_000  # of 144 GB
    assert sum(1 for _ in plan.tasks) == 963
    assert plan.total_size == 2 * sum(math.prod(shape) for shape in LARGE.shapes.values())
    assert len(plan.shards) == 82
    large = [shard for shard in plan.shards if sum(t.target.nbytes for t in shard.tasks) > 2e9]
    assert [[t.target.name for t in shard.tasks] for shard in large] == [[EMBEDDINGS], [HEAD]]
    merged = [t.target.name for t in plan.tasks if t.action == "merged"]
    assert merged == [f"{Q}.weight", f"{K}.weight"]
