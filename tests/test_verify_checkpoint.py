"""``verify`` on whole checkpoints: PEFT's own merges pass, and every planted defect is named."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_json, make_adapter, make_base, oracle, read_tensors
from safetensors.torch import load_file
from test_verify_sample import found, read_rows, write_json, write_ledger, write_out, write_weights
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from merge_core import verify as package
from merge_core.errors import InputError
from merge_core.verify import LEVELS, FileCheck, FileResult, check_file, verify

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GATE = "model.layers.0.mlp.gate_proj.weight"
Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
NORM = "model.layers.0.input_layernorm.weight"
Tensors = dict[str, torch.Tensor]


def merged_names(adapter: Path) -> dict[str, str]:
    """``merged`` for each tensor that the adapter's keys name."""
    keys = load_file(adapter / "adapter_model.safetensors")
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in keys}
    return {f"{module}.weight": "merged" for module in modules}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("verify") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base, r=8, lora_alpha=12)


@pytest.fixture(scope="module")
def right(base: Path, adapter: Path) -> Tensors:
    """The right result, by PEFT."""
    return oracle(base, adapter)


@pytest.fixture(scope="module")
def template(base: Path, adapter: Path, right: Tensors) -> Path:
    out = base.parent / "out"
    return write_out(out, right, merged_names(adapter), base=base, adapters={adapter: 1.0})


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Path:
    """A finished merge for the test to damage."""
    return shutil.copytree(template, tmp_path / "out")


@pytest.fixture
def rewritten(
    base: Path, adapter: Path, right: Tensors, tmp_path: Path
) -> Callable[[Tensors], Path]:
    """A finished merge with some tensors changed, and a ledger that knows no better."""

    def rewrite(changes: Tensors) -> Path:
        tensors = {**right, **changes}
        actions = merged_names(adapter)
        return write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    return rewrite


@pytest.mark.parametrize("level", LEVELS)
def test_peft_s_own_merge_is_right(level: str, out: Path, right: Tensors) -> None:
    report = verify(out, level)

    assert report.findings == ()
    assert report.ok
    assert (report.out, report.level, report.files, report.tensors) == (out, level, 2, len(right))
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in right.values())
    times = {"structure": 0, "digest": 1, "load": 1, "numeric": 3}[level]
    assert report.bytes_read == times * nbytes
    assert report.seconds > 0
    assert len(report.checks) == {"structure": 2, "digest": 3, "numeric": 4, "load": 4}[level]


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rank-stabilised": ({}, {"use_rslora": True}),
    "patterns": ({}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {".*.1.mlp.*": 5}}),
    "bin": ({}, {"safe": False}),
    "bfloat16 factors": ({}, {"dtype": torch.bfloat16}),
    "float16": ({"dtype": torch.float16}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["up_proj"]}),
    "one rank": ({}, {"r": 1, "lora_alpha": 3}),
}


@pytest.mark.parametrize("story", ADAPTERS)
def test_each_kind_of_adapter_is_understood(story: str, tmp_path: Path) -> None:
    base_fields, lora = ADAPTERS[story]
    base = make_base(tmp_path / "base", **base_fields)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    plain = make_adapter(tmp_path / "plain", base, **{**lora, "safe": True})
    tensors, actions = oracle(base, adapter), merged_names(plain)
    out = write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    assert found(out, "numeric") == []
    assert found(out, "load") == []
    doubled = found(out, "numeric", adapters=[(adapter, 2.0)])
    assert {check for check, _ in doubled} == {"merged"}
    assert len(doubled) == len(actions)


def test_several_adapters_are_summed_before_one_rounding(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", base, r=4, seed=2, use_rslora=True)
    tensors = load_file(base / "model.safetensors")
    for name in merged_names(adapter):
        total = tensors[name].float()
        for path, scale in ((adapter, 0.5 * 12 / 8), (other, -1.5 * 16 / 4**0.5)):
            factors = load_file(path / "adapter_model.safetensors")
            module = f"base_model.model.{name.removesuffix('.weight')}"
            b, a = factors[f"{module}.lora_B.weight"], factors[f"{module}.lora_A.weight"]
            total = total + (b @ a) * scale
        tensors[name] = total.to(torch.bfloat16)
    weights = {adapter: 0.5, other: -1.5}
    out = write_out(tmp_path / "out", tensors, merged_names(adapter), base=base, adapters=weights)

    assert found(out, "numeric") == []

    left_out = found(out, "numeric", adapters=[(adapter, 0.5)])
    assert {check for check, _ in left_out} == {"merged"}
    assert len(left_out) == len(merged_names(adapter))
    swapped = found(out, "numeric", adapters=[(adapter, -1.5), (other, 0.5)])
    assert len(swapped) == len(merged_names(adapter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_converted_merge(base: Path, adapter: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT on the base in another dtype: bfloat16 to float32 is exact, so this is one rounding."""
    wide = make_base(tmp_path / "wide", dtype=torch.float32)
    write_weights(
        wide / "model.safetensors",
        {n: t.float() for n, t in load_file(base / "model.safetensors").items()},
    )
    tensors = {name: tensor.to(dtype) for name, tensor in oracle(wide, adapter).items()}
    actions = dict.fromkeys(tensors, "converted") | merged_names(adapter)
    out = write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    assert found(out, "numeric") == []

    tensors[NORM] = tensors[NORM].clone()
    tensors[NORM][5] *= 1 + 2**-10
    out = write_out(out, tensors, actions, base=base, adapters={adapter: 1.0})
    assert found(out, "numeric") == [("converted", f"{FIRST}: {NORM}, row 5")]


def test_transposed_layers_are_understood(tmp_path: Path) -> None:
    """Conv1D, as in GPT-2: the weight is [in, out]."""
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shapes = {"h.0.c_fc": (6, 10), "h.0.c_proj": (6, 6)}
    tensors = {f"{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
    for path in (base, adapter):
        path.mkdir()
    write_json(base / "config.json", {"model_type": "gpt2"})
    write_weights(base / "model.safetensors", tensors)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "fan_in_fan_out": True}
    write_json(adapter / "adapter_config.json", fields)
    factors = {}
    for module, (into, out_) in shapes.items():
        a, b = torch.randn(3, into), torch.randn(out_, 3)
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + ((b @ a) * 2).T
    write_weights(adapter / "adapter_model.safetensors", factors)
    out = write_out(
        tmp_path / "out",
        tensors,
        dict.fromkeys(tensors, "merged"),
        base=base,
        adapters={adapter: 1.0},
        files=1,
    )

    assert found(out, "numeric") == []
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    assert found(out, "numeric") == [("merged", "model.safetensors: h.0.c_proj.weight, row 0")]


def shifted_row(right: Tensors) -> Tensors:
    changed = right[GATE].clone()
    changed[11] = changed[11].roll(1)
    return {GATE: changed}


def shifted_rows(right: Tensors) -> Tensors:
    return {GATE: right[GATE].roll(1, 0)}


def flipped_bit(bit: int) -> Callable[[Tensors], Tensors]:
    def plant(right: Tensors) -> Tensors:
        changed = right[GATE].clone()
        changed.view(torch.int16)[40, 7] ^= 1 << bit
        return {GATE: changed}

    return plant


def one_value(name: str, row: int, value: float) -> Callable[[Tensors], Tensors]:
    def plant(right: Tensors) -> Tensors:
        changed = right[name].clone()
        changed[row] = value
        return {name: changed}

    return plant


DEFECTS: dict[str, tuple[Callable[[Tensors], Tensors], list[tuple[str, str]]]] = {
    "a row shifted by one": (shifted_row, [("merged", f"{FIRST}: {GATE}, row 11")]),
    "all rows shifted by one": (shifted_rows, [("merged", f"{FIRST}: {GATE}, row 0")]),
    "two merged tensors swapped": (
        lambda right: {Q0: right[Q1], Q1: right[Q0]},
        [("merged", f"{FIRST}: {Q0}, row 0"), ("merged", f"{SECOND}: {Q1}, row 0")],
    ),
    "two copied tensors swapped": (
        lambda right: {
            f"model.layers.{n}.self_attn.k_proj.bias": right[
                f"model.layers.{1 - n}.self_attn.k_proj.bias"
            ]
            for n in (0, 1)
        },
        [
            ("copied", f"{file}: model.layers.{n}.self_attn.k_proj.bias, row 0")
            for n, file in enumerate((FIRST, SECOND))
        ],
    ),
    **{
        f"bit {bit} flipped": (flipped_bit(bit), [("merged", f"{FIRST}: {GATE}, row 40")])
        for bit in range(1, 16)
    },
    "NaN": (one_value(GATE, 3, float("nan")), [("finite", f"{FIRST}: {GATE}, row 3")]),
    "infinity": (one_value(Q1, 9, float("-inf")), [("finite", f"{SECOND}: {Q1}, row 9")]),
    "a copied value changed": (one_value(NORM, 60, 2.0), [("copied", f"{FIRST}: {NORM}, row 60")]),
    "another shape": (
        lambda right: {GATE: right[GATE][:-1]},
        [("base", f"{FIRST}: {GATE}")],
    ),
    "a tensor too many": (
        lambda _: {"model.extra": torch.ones(2)},
        [("base", f"{FIRST}: model.extra")],
    ),
}


@pytest.mark.parametrize("story", DEFECTS)
def test_numeric_alone_names_the_defect(
    story: str, right: Tensors, rewritten: Callable[[Tensors], Path]
) -> None:
    plant, expected = DEFECTS[story]
    out = rewritten(plant(right))

    assert found(out, "digest") == []  # the ledger was written from the damaged tensors
    assert found(out, "numeric") == expected


def test_a_delta_left_out_or_doubled_is_found(
    base: Path, adapter: Path, rewritten: Callable[[Tensors], Path]
) -> None:
    untouched = load_file(base / "model.safetensors")
    names = sorted(merged_names(adapter))
    out = rewritten({name: untouched[name] for name in names})

    checks = found(out, "numeric")

    assert {check for check, _ in checks} == {"merged"}
    assert sorted(where.split(": ")[1].split(",")[0] for _, where in checks) == names


def test_a_tensor_left_out_is_found(
    base: Path, adapter: Path, right: Tensors, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in right.items() if name != NORM}
    out = write_out(
        tmp_path / "out", tensors, merged_names(adapter), base=base, adapters={adapter: 1.0}
    )

    assert found(out, "numeric") == [("base", NORM)]
    assert found(out, "load") == [("load", NORM)]


def test_an_adapter_that_fits_nothing_is_found(out: Path, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "deep", num_hidden_layers=3)
    adapter = make_adapter(tmp_path / "other", other, target_modules=["q_proj"])

    checks = found(out, "numeric", adapters=[(adapter, 1.0)])

    assert ("adapter", f"{adapter}: model.layers.2.self_attn.q_proj") in checks


def test_a_ledger_that_calls_a_merge_a_copy_is_found(out: Path) -> None:
    rows = read_rows(out)
    for row in rows:
        if row["tensor"] in (GATE, NORM):
            row["action"] = "converted"
    write_ledger(out, rows)

    assert found(out, "digest") == []
    assert sorted(found(out, "numeric")) == [
        ("ledger", f"{FIRST}: {NORM}"),
        ("ledger", f"{FIRST}: {GATE}"),
    ]


@pytest.mark.parametrize("place", [0, 4096, -1])
def test_a_flipped_bit_anywhere_in_the_data_is_found_by_digest(place: int, out: Path) -> None:
    path = out / SECOND
    blob = bytearray(path.read_bytes())
    blob[place if place < 0 else 4096 + place] ^= 0x10
    path.write_bytes(blob)

    [(check, where)] = found(out, "digest")

    assert check == "digest"
    assert where.startswith(f"{SECOND}: ")
    assert found(out, "structure") == []


def edit_index(out: Path, **changes: Any) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes.pop("weight_map", {}))
    write_json(path, {**index, **changes})


def move_tensor(out: Path) -> None:
    """Into the other file, with index and ledger none the wiser."""
    first, second = load_file(out / FIRST), load_file(out / SECOND)
    second[NORM] = first.pop(NORM)
    write_weights(out / FIRST, first)
    write_weights(out / SECOND, second)


def duplicate_tensor(out: Path) -> None:
    write_weights(out / SECOND, {**load_file(out / SECOND), NORM: load_file(out / FIRST)[NORM]})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = index["metadata"]["total_size"] + 128
    edit_index(out, metadata={"total_size": total})


def cut_file(out: Path) -> None:
    blob = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(blob[:-1])


def change_row(field: str, value: Any) -> Callable[[Path], None]:
    def plant(out: Path) -> None:
        rows = read_rows(out)
        for row in rows:
            if row["tensor"] == NORM:
                row[field] = value
        write_ledger(out, rows)

    return plant


def drop_row(out: Path) -> None:
    write_ledger(out, [row for row in read_rows(out) if row["tensor"] != NORM])


def add_row(out: Path) -> None:
    rows = read_rows(out)
    write_ledger(out, [*rows, {**rows[0], "tensor": "model.more"}])


def repeat_row(out: Path) -> None:
    rows = read_rows(out)
    write_ledger(out, [*rows, rows[0]])


def drop_column(out: Path) -> None:
    write_ledger(out, [{"tensor": row["tensor"]} for row in read_rows(out)])


INDEX, LEDGER = "model.safetensors.index.json", ".raymeld/ledger.parquet"
BREAKAGES: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]]]] = {
    "no config": (lambda out: (out / "config.json").unlink(), [("config", "config.json")]),
    "half a config": (
        lambda out: (out / "config.json").write_text('{"a": '),
        [("config", "config.json")],
    ),
    "a file is missing": (
        lambda out: (out / SECOND).unlink(),
        [("files", SECOND), ("ledger", SECOND)],
    ),
    "a file too many": (
        lambda out: (out / "model-00003-of-00003.safetensors").write_bytes(b""),
        [("files", "model-00003-of-00003.safetensors")],
    ),
    "an old single file": (
        lambda out: shutil.copy(out / FIRST, out / "model.safetensors"),
        [("files", "model.safetensors")],
    ),
    "an old pickle": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b""),
        [("files", "pytorch_model.bin")],
    ),
    "no index": (
        lambda out: (out / INDEX).unlink(),
        [
            ("files", "model.safetensors"),
            ("files", FIRST),
            ("files", SECOND),
            ("ledger", FIRST),
            ("ledger", SECOND),
        ],
    ),
    "half an index": (lambda out: (out / INDEX).write_text("{"), [("index", INDEX)]),
    "an index of another kind": (
        lambda out: (out / INDEX).write_text('{"weight_map": []}'),
        [("index", INDEX)],
    ),
    "an index that leads out": (
        lambda out: edit_index(out, weight_map={NORM: "../model.safetensors"}),
        [("index", INDEX)],
    ),
    "a wrong total_size": (
        lambda out: edit_index(out, metadata={"total_size": 27}),
        [("index", INDEX)],
    ),
    "no total_size": (lambda out: edit_index(out, metadata={}), [("index", INDEX)]),
    "a tensor in the other file": (
        move_tensor,
        [
            ("index", f"{FIRST}: {NORM}"),
            ("index", f"{SECOND}: {NORM}"),
            ("ledger", f"{FIRST}: {NORM}"),
            ("ledger", f"{SECOND}: {NORM}"),
        ],
    ),
    "a tensor in two files": (
        duplicate_tensor,
        [
            ("files", f"{SECOND}: {NORM}"),
            ("index", f"{SECOND}: {NORM}"),
            ("ledger", f"{SECOND}: {NORM}"),
        ],
    ),
    "a tensor that only the index has": (
        lambda out: edit_index(out, weight_map={"model.more": FIRST}),
        [("index", f"{FIRST}: model.more")],
    ),
    "a truncated file": (cut_file, [("header", FIRST)]),
    "an empty file": (lambda out: (out / FIRST).write_bytes(b""), [("header", FIRST)]),
    "another dtype in the ledger": (change_row("dtype", "F16"), [("ledger", f"{FIRST}: {NORM}")]),
    "another shape in the ledger": (change_row("shape", [8, 8]), [("ledger", f"{FIRST}: {NORM}")]),
    "another size in the ledger": (change_row("nbytes", 1), [("ledger", f"{FIRST}: {NORM}")]),
    "another file in the ledger": (
        change_row("file", "elsewhere.safetensors"),
        [("ledger", "elsewhere.safetensors"), ("ledger", f"{FIRST}: {NORM}")],
    ),
    "a null in the ledger": (change_row("digest", None), [("ledger", LEDGER)]),
    "a row too few": (drop_row, [("ledger", f"{FIRST}: {NORM}")]),
    "a row too many": (add_row, [("ledger", f"{FIRST}: model.more")]),
    "a row twice": (repeat_row, [("ledger", LEDGER)]),
    "a column too few": (drop_column, [("ledger", LEDGER)]),
    "no parquet": (lambda out: (out / LEDGER).write_bytes(b"x" * 99), [("ledger", LEDGER)]),
}


@pytest.mark.parametrize("story", BREAKAGES)
def test_structure_names_the_breakage(story: str, out: Path) -> None:
    damage, expected = BREAKAGES[story]
    damage(out)

    assert found(out, "structure") == expected


@pytest.mark.parametrize("level", LEVELS)
def test_breakages_never_stop_a_deeper_check(level: str, out: Path) -> None:
    """The file that is whole is still checked, and nothing raises."""
    cut_file(out)
    (out / "config.json").write_text("[]")

    checks = found(out, level)

    assert ("header", FIRST) in checks
    assert ("config", "config.json") in checks
    assert not [where for check, where in checks if check != "load" and SECOND in where]


def test_a_missing_ledger_matters_from_digest_on(out: Path) -> None:
    (out / LEDGER).unlink()

    report = verify(out, "structure")

    assert report.ok
    assert report.checks == ("config, index, headers, offsets, sizes and the list of files",)
    assert [found(out, level) for level in ("digest", "numeric", "load")] == [
        [("ledger", LEDGER)]
    ] * 3


def test_before_the_commit_the_staged_config_counts(out: Path) -> None:
    (out / "config.json").rename(out / ".raymeld" / "config.json")

    assert [found(out, level, committed=False) for level in LEVELS] == [[]] * 4
    assert found(out, "structure") == [("config", "config.json")]
    finding = verify(out, "structure").findings[0]
    assert finding.what == "it is missing: this is an unfinished merge"
    (out / ".raymeld" / "config.json").unlink()
    assert found(out, "digest", committed=False) == [("config", ".raymeld/config.json")]


def test_load_names_what_the_model_class_misses(
    base: Path, adapter: Path, right: Tensors, tmp_path: Path
) -> None:
    tensors = {**right, "model.more": torch.ones(2), GATE: right[GATE][:-1]}
    del tensors[Q0]
    out = write_out(tmp_path / "out", tensors, base=base, adapters={adapter: 1.0})

    report = verify(out, "load")

    assert [(f.check, f.where, f.what) for f in report.findings] == [
        ("load", Q0, "the model needs it, the checkpoint has not got it"),
        ("load", "model.more", "the model has no place for it"),
        ("load", GATE, "its shape is [95, 64], the model's is [96, 64]"),
    ]


def test_load_respects_fused_experts(tmp_path: Path) -> None:
    """Checkpoints hold an expert's three matrices, transformers 5 holds one tensor for all."""
    config = Qwen2MoeConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        num_experts=3,
        vocab_size=32,
    )
    base = tmp_path / "base"
    Qwen2MoeForCausalLM(config).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in tensors
    out = write_out(tmp_path / "out", tensors, base=base, adapters={}, files=1)

    assert found(out, "load") == []

    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    out = write_out(tmp_path / "out", tensors, base=base, adapters={}, files=1)
    assert [check for check, _ in found(out, "load")] == ["load"]


def test_load_runs_no_code_of_the_checkpoint(out: Path) -> None:
    (out / "mine.py").write_text("raise SystemExit('code of the checkpoint ran')")
    edit_json(out / "config.json", auto_map={"AutoModelForCausalLM": "mine.Model"})
    assert found(out, "load") == []

    edit_json(out / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    assert found(out, "load") == [("load", "config.json")]


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_touches_the_network(
    level: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    edit_json(out / "config.json", _name_or_path="Qwen/Qwen1.5-0.5B")

    assert found(out, level) == []


def test_what_cannot_be_asked_is_refused(out: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="there is no level 'deep'"):
        verify(out, "deep")
    with pytest.raises(InputError, match="it is no directory"):
        verify(out / "config.json")
    with pytest.raises(InputError, match="no base: No such file"):
        verify(out, "numeric", base=out / "nowhere")
    with pytest.raises(InputError, match="no base: No such file"):
        verify(out, "numeric", base=adapter)
    (out / ".raymeld" / "plan.json").unlink()
    with pytest.raises(InputError, match="level numeric needs base and adapters"):
        verify(out, "numeric", base=base)
    assert found(out, "numeric", base=base, adapters=[(adapter, 1.0)]) == []
    assert found(out, "digest") == []


def test_an_adapter_that_cannot_be_checked_is_refused(
    out: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    dora = make_adapter(tmp_path / "dora", base, use_dora=True, target_modules=["q_proj"])

    with pytest.raises(InputError) as caught:
        verify(out, "numeric", adapters=[(adapter, 1.0), (dora, 1.0)])

    assert str(caught.value.problems[0]).startswith(f"{dora}: cannot check use_dora = True")
    assert len(caught.value.problems) == 3  # the field, and both layers' magnitude vectors


def test_checks_and_results_can_travel(out: Path) -> None:
    """On a cluster they cross processes, and come back in any order."""
    sent: list[int] = []

    def remotely(
        work: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        blobs = [pickle.dumps(check) for check in checks]
        sent.extend(map(len, blobs))
        results = [work(pickle.loads(blob)) for blob in blobs]
        return [pickle.loads(pickle.dumps(result)) for result in reversed(results)]

    blob = bytearray((out / FIRST).read_bytes())
    blob[-1] ^= 1
    (out / FIRST).write_bytes(blob)
    cut = (out / SECOND).read_bytes()[:-1]
    (out / SECOND).write_bytes(cut)

    here, there = (verify(out, "numeric", run=run) for run in (map, remotely))

    assert here.findings == there.findings
    assert [finding.where.split(":")[0] for finding in here.findings] == [FIRST, FIRST, SECOND]
    assert max(sent) < 20_000


def test_a_check_that_gets_lost_is_a_finding(out: Path) -> None:
    def lossy(
        work: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        return map(work, checks[1:])

    assert found(out, "digest", run=lossy) == [("files", FIRST)]


def test_a_base_that_vanishes_under_the_check_is_a_finding(out: Path, base: Path) -> None:
    gone: list[FileCheck] = []
    verify(out, "numeric", run=lambda work, checks: map(work, gone.extend(checks) or checks))
    comparisons = tuple(
        dataclasses.replace(c, base=dataclasses.replace(c.base, path=f"{base}/gone"))
        for c in gone[0].comparisons
    )

    result = check_file(dataclasses.replace(gone[0], comparisons=comparisons))

    assert [(f.check, f.where) for f in result.findings] == [("read", FIRST)]
    assert f"{base}/gone" in result.findings[0].what


def test_inputs_are_left_as_they_are(out: Path) -> None:
    def listing() -> list[tuple[str, int, int]]:
        paths = sorted(path for path in out.rglob("*") if path.is_file())
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    before = listing()
    for level in LEVELS:
        verify(out, level)

    assert listing() == before


def test_structure_and_digest_run_without_torch(out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from merge_core.verify import verify\n"
        f"assert verify(Path({str(out)!r}), 'digest').ok\n"
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)"
    )
    root = Path(package.__file__).parents[2]

    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_package_shares_nothing_with_the_merge() -> None:
    allowed = {"numpy", "xxhash", "pyarrow", "torch", "transformers"} | sys.stdlib_module_names
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                ours = name == "merge_core.errors" or name.startswith("merge_core.verify")
                assert ours or name.split(".")[0] in allowed, (path.name, name)


def test_the_oracle_is_what_the_template_holds(template: Path, right: Tensors) -> None:
    assert read_tensors(template).keys() == right.keys()
