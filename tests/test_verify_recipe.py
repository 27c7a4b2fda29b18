"""What an adapter's files say: scales, orientation, and everything that must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_verify_sample import write_json, write_weights

from merge_core.errors import InputError
from merge_core.verify.recipe import Delta, adapter_deltas

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj"
BASE = {f"{Q}.weight": (6, 6), f"{UP}.weight": (10, 6), "model.norm.weight": (6,)}


def write_adapter(
    path: Path,
    ranks: dict[str, int],
    shapes: dict[str, tuple[int, int]] | None = None,
    **fields: Any,
) -> Path:
    """Factors for the modules of ``ranks``, with B @ A of the base's shape or of ``shapes``."""
    path.mkdir(exist_ok=True)
    config = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    write_json(path / "adapter_config.json", {**config, "peft_type": "LORA", **fields})
    tensors = {}
    for module, rank in ranks.items():
        out, into = {**BASE, **(shapes or {})}[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(rank, into)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(out, rank)
    write_weights(path / "adapter_model.safetensors", tensors)
    return path


def deltas(path: Path, weight: float = 1.0, model_type: str = "qwen2") -> dict[str, Delta]:
    found, findings = adapter_deltas(path, weight, BASE, model_type)
    assert findings == []
    return found


SCALES = {
    "plain": ({"r": 4, "lora_alpha": 10}, 1.0, 10 / 4, 10 / 4),
    "weighted": ({"r": 4, "lora_alpha": 10}, -0.5, -10 / 8, -10 / 8),
    "rank-stabilised": ({"r": 4, "lora_alpha": 10, "use_rslora": True}, 1.0, 5.0, 5.0),
    "rank by module": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}}, 1.0, 2.0, 4.0),
    "rank by module, stabilised": (
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}, "use_rslora": True},
        1.0,
        4.0,
        8 / math.sqrt(2),
    ),
    "alpha by module": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}},
        1.0,
        0.5,
        2.0,
    ),
    "the first pattern wins": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {".*proj": 16, "q_proj": 2}},
        1.0,
        4.0,
        4.0,
    ),
    "a pattern is for the end, from a dot on": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"mlp": 2, "roj": 3, "1.mlp.up_proj": 20}},
        1.0,
        2.0,
        2.0,
    ),
    "a dot in a pattern is any character": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"11.mlp.up.proj": 20}},
        1.0,
        2.0,
        5.0,
    ),
    "a pattern for the whole path": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"^model\.layers\.1\..*": 2}},
        1.0,
        0.5,
        2.0,
    ),
}


@pytest.mark.parametrize("story", SCALES)
def test_scales_follow_peft(story: str, tmp_path: Path) -> None:
    fields, weight, q_scale, up_scale = SCALES[story]
    ranks = {Q: 4, UP: fields.get("rank_pattern", {}).get("up_proj", 4)}

    found = deltas(write_adapter(tmp_path / "a", ranks, **fields), weight)

    assert {name: delta.scale for name, delta in found.items()} == {
        f"{Q}.weight": pytest.approx(q_scale, rel=1e-15),
        f"{UP}.weight": pytest.approx(up_scale, rel=1e-15),
    }
    assert found[f"{Q}.weight"].a == f"base_model.model.{Q}.lora_A.weight"
    assert found[f"{Q}.weight"].path == str(tmp_path / "a" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("model_type", "flag", "module", "shape", "transposed"),
    [
        ("qwen2", True, Q, (6, 6), False),  # always nn.Linear, whatever the flag says
        ("qwen2", True, UP, (10, 6), False),
        ("qwen2_moe", True, Q, (6, 6), False),
        ("gpt2", True, Q, (6, 6), True),
        ("gpt2", False, Q, (6, 6), False),
        ("gpt2", False, UP, (10, 6), False),
        ("gpt2", True, UP, (10, 6), False),  # the shapes leave no choice
        ("gpt2", False, UP, (6, 10), True),
    ],
)
def test_orientation(
    model_type: str,
    flag: bool,
    module: str,
    shape: tuple[int, int],
    transposed: bool,
    tmp_path: Path,
) -> None:
    path = write_adapter(
        tmp_path / "a", {module: 8}, {f"{module}.weight": shape}, fan_in_fan_out=flag
    )

    found = deltas(path, model_type=model_type)

    assert found[f"{module}.weight"].transposed == transposed


MISFITS: dict[str, tuple[dict[str, int], dict[str, tuple[int, int]], str]] = {
    "no such base tensor": (
        {"model.layers.7.nothing": 8},
        {"model.layers.7.nothing.weight": (6, 6)},
        "the base has no tensor 'model.layers.7.nothing.weight' to add it to",
    ),
    "another rank than the config's": (
        {Q: 4},
        {},
        "A is (4, 6), B is (6, 4); the config says rank 8",
    ),
    "another shape": (
        {UP: 8},
        {f"{UP}.weight": (9, 6)},
        "B @ A is [9, 6], the base tensor is [10, 6]",
    ),
    "transposed in a model of linear layers": (
        {UP: 8},
        {f"{UP}.weight": (6, 10)},
        "B @ A is [6, 10], the base tensor is [10, 6]",
    ),
    "a base tensor that is no matrix": (
        {"model.norm": 8},
        {"model.norm.weight": (6, 1)},
        "B @ A is [6, 1], the base tensor is [6]",
    ),
}


@pytest.mark.parametrize("story", MISFITS)
def test_factors_that_fit_nothing_are_findings(story: str, tmp_path: Path) -> None:
    ranks, shapes, what = MISFITS[story]
    path = write_adapter(tmp_path / "a", ranks, shapes)

    found, [finding] = adapter_deltas(path, 1.0, BASE, "qwen2")

    assert found == {}
    assert (finding.check, finding.where) == ("adapter", f"{path}: {next(iter(ranks))}")
    assert finding.what == what


def test_half_a_pair_is_a_finding(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {})
    key = f"base_model.model.{Q}.lora_B.weight"
    write_weights(path / "adapter_model.safetensors", {key: torch.zeros(6, 8)})

    _, [finding] = adapter_deltas(path, 1.0, BASE, "qwen2")

    assert finding.what == "A is None, B is (6, 8); the config says rank 8"


REFUSED = {
    "peft_type": "LOHA",
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2]],
    "init_lora_weights": "pissa",
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1},
    "velora_config": {"scale": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "ensure_weight_tying": True,
    "a_field_of_next_year": {"on": True},
    "rank_pattern": {"(": 4},
    "alpha_pattern": {"q_proj": "4"},
    "r": 0,
    "lora_alpha": None,
}


@pytest.mark.parametrize("field", REFUSED)
def test_features_that_cannot_be_checked_are_named(field: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {Q: 8}, **{field: REFUSED[field]})

    with pytest.raises(InputError) as caught:
        adapter_deltas(path, 1.0, BASE, "qwen2")

    [problem] = caught.value.problems
    assert problem.where == str(path)
    assert problem.what.startswith("cannot check ")
    assert field in problem.what


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_fine(
    init: bool | str, tmp_path: Path
) -> None:
    assert len(deltas(write_adapter(tmp_path / "a", {Q: 8}, init_lora_weights=init))) == 1


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.lora_magnitude_vector",
        f"base_model.model.{Q}.lora_B.bias",
        f"base_model.model.{Q}.base_layer.bias",
        f"base_model.model.{Q}.lora_A.default.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
        f"{Q}.lora_A.weight",
    ],
)
def test_tensors_that_cannot_be_checked_are_named(key: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {})
    write_weights(path / "adapter_model.safetensors", {key: torch.zeros(8, 6)})

    with pytest.raises(InputError) as caught:
        adapter_deltas(path, 1.0, BASE, "qwen2")

    assert str(caught.value).startswith(f"{path}: cannot check tensor {key!r}")


def test_everything_is_refused_at_once(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {Q: 8}, use_dora=True, lora_bias=True)

    with pytest.raises(InputError) as caught:
        adapter_deltas(path, 1.0, BASE, "qwen2")

    assert sorted(p.what for p in caught.value.problems) == [
        "cannot check lora_bias = True",
        "cannot check use_dora = True",
    ]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {Q: 8})

    (path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="the adapter's config cannot be read"):
        adapter_deltas(path, 1.0, BASE, "qwen2")

    write_adapter(path, {Q: 8})
    (path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="the adapter's weights cannot be read"):
        adapter_deltas(path, 1.0, BASE, "qwen2")

    write_weights(path / "adapter_model.safetensors", {"k": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(InputError, match="cannot check tensor 'k' of dtype I64"):
        adapter_deltas(path, 1.0, BASE, "qwen2")

    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it holds no adapter_model.safetensors or .bin"):
        adapter_deltas(path, 1.0, BASE, "qwen2")


class Payload:
    """What a hostile .bin would run when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the adapter ran",))


@pytest.mark.parametrize("content", [{"k": Payload()}, [torch.zeros(2)], b"no pickle"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_that_is_no_dictionary_of_tensors_is_refused(
    content: Any, zipped: bool, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "a", {})
    (path / "adapter_model.safetensors").unlink()
    target = path / "adapter_model.bin"
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        torch.save(content, target, _use_new_zipfile_serialization=zipped)

    with pytest.raises(InputError, match="the adapter's weights cannot be read"):
        adapter_deltas(path, 1.0, BASE, "qwen2")
