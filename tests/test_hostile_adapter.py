"""Adapters that a merge must refuse: exit code 2, by name, before anything is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from handmade import (
    TWO_LANES,
    Geometry,
    keyed,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
    write_json,
)
from models import edit_json
from safetensors.torch import load_file, save_file

from merge_core.adapter import parse_adapter
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.peft_fields import FEATURE_FIELDS, FEATURE_KEYS, TUNERS
from merge_core.planner import make_plan

SMALL = Geometry(layers=1)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
QA, QB = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


@dataclass
class Scene:
    """A merge, of which each test spoils something."""

    base: Path
    adapter: Path
    out: Path

    def refusal(self, weight: str = "") -> str:
        with pytest.raises(InputError) as caught:
            merge(make_plan(self.base, [f"{self.adapter}{weight}"]), self.out, device="cpu")
        assert caught.value.exit_code == 2
        assert not self.out.exists()
        text = str(caught.value)
        text.encode()  # can be printed
        assert str(self.adapter) in text
        return text

    def configure(self, **fields: object) -> None:
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        write_json(self.adapter / "adapter_config.json", {**config, **fields})

    def keep(self, **tensors: torch.Tensor | None) -> None:
        """Change tensors of the weight file; None removes one."""
        file = self.adapter / "adapter_model.safetensors"
        changed = {**load_file(file), **tensors}
        save_file({k: v for k, v in changed.items() if v is not None}, file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "base"
    return write_base(path, random_tensors(SMALL), SMALL.config)


@pytest.fixture
def scene(base: Path, tmp_path: Path, out: Path) -> Scene:
    factors = random_factors(SMALL.linear, {Q: 4, DOWN: 4})
    return Scene(base, write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8), out)


def test_an_adapter_for_another_size_is_refused(scene: Scene) -> None:
    scene.keep(**{QA: torch.ones(4, 64), QB: torch.ones(64, 4)})
    said = f"module {Q}: the delta is [64, 64], the base tensor [32, 32]"
    assert said in scene.refusal()


def test_layers_that_the_base_lacks_are_refused(scene: Scene) -> None:
    deep = Geometry(layers=6)
    ranks = {f"model.layers.{n}.self_attn.q_proj": 4 for n in range(6)}
    write_adapter(scene.adapter, random_factors(deep.linear, ranks), r=4, lora_alpha=8)
    names = ", ".join(f"model.layers.{n}.self_attn.q_proj.weight" for n in (1, 2, 3))
    assert f"the base has no {names} and 2 more" in scene.refusal()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({QB: None}, f"module {Q}: has lora_A but no lora_B"),
        ({QA: None}, f"module {Q}: has lora_B but no lora_A"),
        (
            {QA: torch.ones(2, 32), QB: torch.ones(32, 2)},
            "lora_A has rank 2, lora_B 2, the config says 4",
        ),
        ({QB: torch.ones(32, 2)}, "lora_A has rank 4, lora_B 2, the config says 4"),
        ({QA: torch.ones(4)}, f"{QA} has shape [4], not two sizes above 0"),
        ({QA: torch.ones(0, 32)}, f"{QA} has shape [0, 32], not two sizes above 0"),
        ({QA: torch.ones(4, 32).to(torch.float64)}, f"{QA} is F64, not F32, F16 or BF16"),
        ({"what.is.this": torch.ones(1)}, "key 'what.is.this' is not known"),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            "is not known, and nothing is dropped silently",
        ),
    ],
)
def test_factors_that_make_no_delta_are_refused(
    scene: Scene, tensors: dict[str, torch.Tensor | None], said: str
) -> None:
    scene.keep(**tensors)
    assert said in scene.refusal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_factor_that_is_not_finite_is_refused_with_its_row(
    scene: Scene, dtype: torch.dtype, value: float
) -> None:
    factor = torch.full((32, 4), torch.finfo(dtype).max, dtype=dtype)
    factor[17, 2] = value
    scene.keep(**{QB: factor})
    assert f"tensor {QB!r}: holds NaN or infinity in row 17" in scene.refusal()


def test_an_empty_adapter_is_refused(scene: Scene) -> None:
    save_file({}, scene.adapter / "adapter_model.safetensors")
    assert "the adapter is empty: it holds no tensor" in scene.refusal()
    (scene.adapter / "adapter_model.safetensors").unlink()
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in scene.refusal()


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    scene: Scene, tmp_path: Path, zipped: bool
) -> None:
    (scene.adapter / "adapter_model.safetensors").unlink()
    file, ran = scene.adapter / "adapter_model.bin", tmp_path / "ran"
    if zipped:
        torch.save({QA: torch.ones(4, 32), QB: Payload(ran)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(ran)))
    assert "adapter_model.bin: cannot be loaded with weights_only" in scene.refusal()
    assert not ran.exists()


def test_a_damaged_pickle_is_refused(scene: Scene) -> None:
    state = load_file(scene.adapter / "adapter_model.safetensors")
    (scene.adapter / "adapter_model.safetensors").unlink()
    file = scene.adapter / "adapter_model.bin"
    torch.save(state, file)
    content = file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 10, 0):
        file.write_bytes(content[:size])
        assert "adapter_model.bin: cannot be loaded with weights_only" in scene.refusal()
    for other in ([1, 2], {**state, 7: torch.ones(1)}, {**state, QA: 1.0}, torch.ones(1)):
        torch.save(other, file)
        assert "adapter_model.bin: holds " in scene.refusal()


@pytest.mark.parametrize("value", [True, 0.5, "x", [1], {"a": 1}])
def test_an_unknown_config_field_with_a_value_is_refused(scene: Scene, value: object) -> None:
    scene.configure(use_next_great_thing=value)
    assert f"field 'use_next_great_thing' = {value!r} is not known" in scene.refusal()


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_config_field_that_is_off_is_accepted(scene: Scene, value: object) -> None:
    scene.configure(use_next_great_thing=value)
    assert len(make_plan(scene.base, [scene.adapter]).adapters) == 1


def test_an_unknown_config_field_of_zero_is_refused(scene: Scene) -> None:
    scene.configure(next_scale=0)
    assert "field 'next_scale' = 0 is not known" in scene.refusal()


@pytest.mark.parametrize(("field", "feature"), FEATURE_FIELDS.items())
def test_a_feature_in_the_config_is_refused_by_name(scene: Scene, field: str, feature: str) -> None:
    scene.configure(**{field: ["x"]})
    assert f"{feature} is not merged yet ({field} is set)" in scene.refusal()
    scene.configure(**{field: None})
    assert len(make_plan(scene.base, [scene.adapter]).adapters) == 1


KEYS = {
    f"{Q}.lora_magnitude_vector.weight": "DoRA",
    f"{Q}.lora_magnitude_vector": "DoRA",
    f"{Q}.lora_B.bias": "a bias on lora_B (lora_bias)",
    "model.embed_tokens.lora_embedding_A": "LoRA on embeddings",
    "model.embed_tokens.lora_embedding_B": "LoRA on embeddings",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": "trainable tokens",
    "model.embed_tokens.trainable_tokens_delta": "trainable tokens",
    "lm_head.modules_to_save.weight": "fully trained modules (modules_to_save)",
    f"{Q}.lora_velora_embed.weight": "VeLoRA",
    f"{Q}.lora_monteclora_sampler.std": "MonteCLoRA",
    f"{Q}.lora_diag": "KaSA",
    f"{Q}.base_layer.lora_A.weight": "LoRA on parameters (target_parameters)",
    f"{Q}.bias": "trained biases (bias)",
    f"{Q}.lora_E": "AdaLoRA",
    f"{Q}.ranknum": "AdaLoRA",
    "lm_head.weight": "fully trained modules (modules_to_save)",
}


@pytest.mark.parametrize(("key", "feature"), KEYS.items())
def test_a_feature_among_the_keys_is_refused_by_name(scene: Scene, key: str, feature: str) -> None:
    name = f"base_model.model.{key}"
    scene.keep(**{name: torch.ones(2)})
    assert f"{feature} is not merged yet (1 tensors, such as {name!r})" in scene.refusal()


def test_every_kind_of_key_is_tried() -> None:
    assert set(KEYS.values()) == {feature for _, feature in FEATURE_KEYS}


@pytest.mark.parametrize("bias", ["all", "lora_only", True, None])
def test_trained_biases_are_refused(scene: Scene, bias: object) -> None:
    scene.configure(bias=bias)
    assert f"trained biases (bias={bias!r}) are not merged yet" in scene.refusal()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "new"])
def test_an_initialisation_that_changed_the_base_is_refused_with_the_way_out(
    scene: Scene, init: str
) -> None:
    scene.configure(init_lora_weights=init)
    text = scene.refusal()
    assert f"init_lora_weights={init!r} may change the base weights" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize("kind", sorted(TUNERS - {"LORA"}))
def test_another_tuner_is_refused_by_name(scene: Scene, kind: str) -> None:
    scene.configure(peft_type=kind)
    assert f"peft_type {kind} is not merged yet, only LORA is" in scene.refusal()


@pytest.mark.parametrize("kind", ["LORAX", "lora", "", None, 7, ["LORA"], {"LORA": 1}])
def test_what_is_no_tuner_is_refused(scene: Scene, kind: object) -> None:
    scene.configure(peft_type=kind)
    assert f"peft_type is {kind!r}, which is no PEFT type" in scene.refusal()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, -1, "8", True, 8.0, None, [8], 10**400]),
        ("lora_alpha", [None, float("nan"), float("inf"), "16", True, 10**400]),
        ("use_rslora", ["true", 1]),
        ("fan_in_fan_out", ["false", 0]),
        ("rank_pattern", [[8], "q_proj", {"q_proj": 0}, {"q_proj": "8"}, {"(": 8}, {"[": 8}]),
        ("alpha_pattern", [[8], {"q_proj": None}, {"q_proj": float("nan")}, {"*": 8}]),
    ],
)
def test_malformed_values_are_refused(scene: Scene, field: str, values: list[object]) -> None:
    for value in values:
        scene.configure(**{field: value})
        assert f"{field} is {value!r}, not " in scene.refusal()


@pytest.mark.parametrize("config", [b"{", b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(scene: Scene, config: bytes) -> None:
    (scene.adapter / "adapter_config.json").write_bytes(config)
    assert "adapter_config.json: is no JSON" in scene.refusal()


def test_lora_on_a_tied_head_is_refused(scene: Scene, tmp_path: Path) -> None:
    tied = Geometry(layers=1, tied=True)
    scene.base = write_base(tmp_path / "tied", random_tensors(tied), tied.config)
    factors = random_factors({"lm_head": (80, 32)}, {"lm_head": 4})
    save_file(keyed(factors), scene.adapter / "adapter_model.safetensors")
    assert "LoRA on an lm_head that is tied" in scene.refusal()


def test_what_is_no_adapter_is_refused(scene: Scene, tmp_path: Path) -> None:
    scene.adapter = scene.adapter / "nowhere"
    assert "ADAPTER does not exist" in scene.refusal()
    scene.adapter = scene.base / "config.json"
    assert "ADAPTER is a file" in scene.refusal()
    scene.adapter = scene.base
    assert "is a checkpoint, not an adapter" in scene.refusal()
    scene.adapter = tmp_path / "run"
    for name in ("default", "style"):
        (scene.adapter / name).mkdir(parents=True)
        shutil.copy(tmp_path / "adapter" / "adapter_config.json", scene.adapter / name)
    text = scene.refusal()
    assert "has no adapter_config.json; there is one in default, style" in text
    assert str(scene.adapter / "default") in text


@pytest.mark.parametrize("weight", ["@0", "@-0.0", "@.0", "@" + "9" * 400])
def test_a_weight_that_merges_nothing_sensible_is_refused(scene: Scene, weight: str) -> None:
    assert "merges nothing sensible" in scene.refusal(weight)


def test_a_weight_is_read_behind_the_last_at_sign(tmp_path: Path) -> None:
    for text, path, weight in (
        ("a@0.5", "a", 0.5),
        ("a@-.25", "a", -0.25),
        ("a@+2.", "a", 2.0),
        ("me@home/a@0.1", "me@home/a", 0.1),
        ("a@v2", "a@v2", 1.0),
        ("a@1e3", "a@1e3", 1.0),
        ("a@nan", "a@nan", 1.0),
        ("a@", "a@", 1.0),
    ):
        assert parse_adapter(text) == (Path(path), weight)
    (tmp_path / "a@0.5").mkdir()
    assert parse_adapter(tmp_path / "a@0.5") == (tmp_path / "a@0.5", 1.0)
    assert parse_adapter(f"{tmp_path}/a@0.5@0.25") == (tmp_path / "a@0.5", 0.25)


def test_problems_of_base_and_adapters_are_told_at_once(scene: Scene, tmp_path: Path) -> None:
    other = shutil.copytree(scene.adapter, tmp_path / "other")
    scene.configure(use_dora=True, r=0, bias="all")
    scene.keep(**{QB: None})
    save_file({}, other / "adapter_model.safetensors")
    base = shutil.copytree(scene.base, tmp_path / "broken")
    edit_json(base / "config.json", vocab_size=None)
    with pytest.raises(InputError) as caught:
        make_plan(base, [scene.adapter, f"{other}@0"], dtype="int8")
    found = [problem.what for problem in caught.value.problems]
    for said in ("'int8'", "vocab_size", "DoRA", "bias=", "r is 0", "weight 0.0", "is empty"):
        assert any(said in what for what in found), said
    assert str(caught.value).startswith(f"{len(found)} problems:\n  1. ")


def test_the_scene_merges_when_nothing_is_spoilt(scene: Scene) -> None:
    merge(make_plan(scene.base, [scene.adapter]), scene.out, device="cpu", choice=TWO_LANES)
    assert "config.json" in published(scene.out)
