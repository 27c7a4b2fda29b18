"""Everything beside plain factors is refused by name where file and config do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import Geometry, random_tensors, write_base
from models import edit_json
from safetensors.torch import load_file, save_file
from scenes import QB, AdapterScene, Q

from merge_core.errors import InputError
from merge_core.planner import make_plan

P = "base_model.model."
EMBED, HEAD = f"{P}model.embed_tokens", f"{P}lm_head"
BIAS = f"{P}{Q}.base_layer.bias"
SIZE, WIDTH = 80, 32
"""Of the scene's embeddings."""
MAGNITUDE, B_BIAS = f"{P}{Q}.lora_magnitude_vector", f"{P}{Q}.lora_B.bias"
TOKENS = f"{EMBED}.token_adapter.trainable_tokens_delta"
O_PROJ = "model.layers.0.self_attn.o_proj"


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


Case = tuple[dict[str, Any], dict[str, torch.Tensor | None], str]
"""Fields of the config, tensors of the file, and what is said."""

CASES: dict[str, Case] = {
    "DoRA without magnitudes": (
        {"use_dora": True},
        {},
        "use_dora is true, and lora_magnitude_vector is missing",
    ),
    "magnitudes without DoRA": (
        {},
        {MAGNITUDE: ones(32)},
        "use_dora is false, and lora_magnitude_vector is there",
    ),
    "a magnitude of another size": (
        {"use_dora": True},
        {MAGNITUDE: ones(31)},
        f"{MAGNITUDE} has shape [31], not [32]",
    ),
    "a magnitude that is a matrix": (
        {"use_dora": True},
        {MAGNITUDE: ones(1, 32)},
        f"{MAGNITUDE} has shape [1, 32], not [32]",
    ),
    "a magnitude in two spellings": (
        {"use_dora": True},
        {MAGNITUDE: ones(32), f"{MAGNITUDE}.weight": ones(32)},
        "are the same tensor",
    ),
    "lora_bias without biases": (
        {"lora_bias": True},
        {},
        "lora_bias is true, and lora_B.bias is missing",
    ),
    "a bias on B without lora_bias": (
        {},
        {B_BIAS: ones(32)},
        "lora_bias is false, and lora_B.bias is there",
    ),
    "a bias on B of another size": (
        {"lora_bias": True},
        {B_BIAS: ones(33)},
        f"{B_BIAS} has shape [33], not [32]",
    ),
    "a bias that bias=none does not explain": (
        {},
        {BIAS: ones(32)},
        f"{BIAS!r} is there as a whole, which bias does not say",
    ),
    "a bias of a module without factors under lora_only": (
        {"bias": "lora_only"},
        {BIAS: ones(32), f"{P}model.layers.0.self_attn.k_proj.bias": ones(16)},
        "k_proj.bias' is there as a whole, which bias does not say",
    ),
    "bias=all without biases": (
        {"bias": "all"},
        {},
        "bias=all covers model.layers.0.self_attn.k_proj.bias",
    ),
    "bias=lora_only without biases": (
        {"bias": "lora_only"},
        {},
        f"bias=lora_only covers {Q}.bias, for which the file holds nothing",
    ),
    "a bias of another size": (
        {"bias": "lora_only"},
        {BIAS: ones(8)},
        "is [8], the base tensor [32]",
    ),
    "a bias that the base lacks": (
        {"bias": "all"},
        {f"{P}{O_PROJ}.bias": ones(32)},
        f"the base has no {O_PROJ}.bias",
    ),
    "a module to save that is not there": (
        {"modules_to_save": ["lm_head"]},
        {},
        "modules_to_save covers lm_head.weight, for which the file holds nothing",
    ),
    "a module to save that no model has": (
        {"modules_to_save": ["classifier"]},
        {},
        "modules_to_save covers classifier",
    ),
    "a whole module that the config does not name": (
        {},
        {f"{P}model.norm.weight": ones(32)},
        "model.norm.weight' is there as a whole, which modules_to_save does not say",
    ),
    "a whole module of another shape": (
        {"modules_to_save": ["norm"]},
        {f"{P}model.norm.weight": ones(31)},
        "is [31], the base tensor [32]",
    ),
    "a whole head of another width": (
        {},
        {f"{HEAD}.weight": ones(SIZE, 31)},
        f"is [{SIZE}, 31], the base tensor [{SIZE}, {WIDTH}]",
    ),
    "a vocabulary of no tokens": (
        {},
        {f"{HEAD}.weight": ones(0, WIDTH)},
        f"is [0, {WIDTH}], the base tensor",
    ),
    "a vocabulary that is resized at one end": (
        {},
        {f"{HEAD}.weight": ones(SIZE + 4, WIDTH)},
        "the vocabulary is resized at one end only",
    ),
    "a base weight beside factors that are lost": (
        {},
        {f"{HEAD}.base_layer.weight": ones(SIZE, WIDTH)},
        "stands beside factors, and there are none of this module",
    ),
    "a whole module in two spellings": (
        {"modules_to_save": ["norm"]},
        {
            f"{P}model.norm.modules_to_save.weight": ones(32),
            f"{P}model.norm.modules_to_save.default.weight": ones(32),
        },
        "are the same tensor",
    ),
    "a module from before its training alone": (
        {},
        {f"{HEAD}.original_module.weight": ones(SIZE, WIDTH)},
        "is there without what was made of it",
    ),
    "a module from before a training that the config does not name": (
        {},
        {
            f"{HEAD}.original_module.weight": ones(SIZE, WIDTH),
            f"{HEAD}.weight": ones(SIZE, WIDTH),
        },
        "is there, and modules_to_save does not name its module",
    ),
    "token rows that the config does not name": (
        {},
        {TOKENS: ones(2, WIDTH)},
        "the config names no trained tokens of this module",
    ),
    "token rows that are not there": (
        {"trainable_token_indices": [1, 2]},
        {},
        "trained tokens covers the embeddings, for which the file holds nothing",
    ),
    "token rows of a head that is not tied": (
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
        {TOKENS: ones(2, WIDTH)},
        "trained tokens covers lm_head, for which the file holds nothing",
    ),
    "another number of token rows": (
        {"trainable_token_indices": [1, 2, 3]},
        {TOKENS: ones(2, WIDTH)},
        f"has shape [2, {WIDTH}], the config names 3 tokens",
    ),
    "token rows of another width": (
        {"trainable_token_indices": [1, 2]},
        {TOKENS: ones(2, 8)},
        "its rows are [2, 8], the base tensor [80, 32]",
    ),
    "a token behind the last": (
        {"trainable_token_indices": [1, SIZE]},
        {TOKENS: ones(2, WIDTH)},
        f"token {SIZE} is none of the base's {SIZE}",
    ),
    "half of the factors of an embedding": (
        {},
        {f"{EMBED}.lora_embedding_A": ones(4, SIZE)},
        "has lora_embedding_A but no lora_embedding_B",
    ),
    "an embedding of another size": (
        {},
        {
            f"{EMBED}.lora_embedding_A": ones(4, SIZE + 1),
            f"{EMBED}.lora_embedding_B": ones(WIDTH, 4),
        },
        f"the delta is [{SIZE + 1}, {WIDTH}], the base tensor [{SIZE}, {WIDTH}]",
    ),
    "linear factors on an embedding": (
        {},
        {f"{EMBED}.lora_A.weight": ones(4, WIDTH), f"{EMBED}.lora_B.weight": ones(SIZE, 4)},
        "has linear factors on an embedding, which PEFT never writes",
    ),
    "factors of both kinds": (
        {},
        {f"{P}{Q}.lora_embedding_A": ones(4, 32), f"{P}{Q}.lora_embedding_B": ones(32, 4)},
        "has factors of a linear layer and of an embedding",
    ),
    "rows and factors of one embedding": (
        {"trainable_token_indices": [1]},
        {
            TOKENS: ones(1, WIDTH),
            f"{EMBED}.lora_embedding_A": ones(4, SIZE),
            f"{EMBED}.lora_embedding_B": ones(WIDTH, 4),
        },
        "some of its rows are replaced, and others add to the whole of it",
    ),
    "a target without factors": (
        {"target_modules": ["q_proj", "down_proj", "o_proj"]},
        {},
        f"target_modules covers {O_PROJ}, for which the file holds nothing",
    ),
}


@pytest.mark.parametrize("story", CASES)
def test_what_does_not_fit_together_is_refused(adapter_scene: AdapterScene, story: str) -> None:
    fields, tensors, said = CASES[story]
    adapter_scene.configure(**fields)
    adapter_scene.keep(**tensors)

    with pytest.raises(InputError) as caught:
        make_plan(adapter_scene.base, [adapter_scene.adapter])

    assert said in str(caught.value)


def test_a_bias_on_b_without_a_bias_in_the_base_is_refused(adapter_scene: AdapterScene) -> None:
    """The scene's second module, down_proj, has none in any Qwen1.5."""
    down = Q.replace("self_attn.q_proj", "mlp.down_proj")
    adapter_scene.configure(lora_bias=True)
    adapter_scene.keep(**{B_BIAS: ones(32), f"{P}{down}.lora_B.bias": ones(32)})

    text = adapter_scene.refusal()
    assert f"module {down}: lora_bias is set, and the base has no bias there" in text


@pytest.mark.parametrize("key", [MAGNITUDE, B_BIAS, BIAS, TOKENS, f"{HEAD}.weight"])
def test_values_that_are_not_finite_are_refused_wherever_they_stand(
    adapter_scene: AdapterScene, key: str
) -> None:
    down = Q.replace("self_attn.q_proj", "mlp.down_proj")
    adapter_scene.keep(**{f"{P}{down}.lora_{x}.weight": None for x in "AB"})
    shape = {TOKENS: (2, WIDTH), f"{HEAD}.weight": (SIZE, WIDTH)}.get(key, (32,))
    tensor = ones(*shape)
    tensor.view(-1)[-1] = float("nan")
    adapter_scene.keep(**{key: tensor})
    adapter_scene.configure(
        use_dora=key == MAGNITUDE,
        lora_bias=key == B_BIAS,
        bias="lora_only" if key == BIAS else "none",
        trainable_token_indices=[3, 7] if key == TOKENS else None,
    )

    assert f"tensor {key!r}: holds NaN or infinity in row {shape[0] - 1}" in adapter_scene.refusal()


def second(scene: AdapterScene, path: Path) -> Path:
    """A copy of the scene's adapter."""
    path.mkdir()
    for file in scene.adapter.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_two_adapters_that_bring_different_values_of_a_whole_tensor_are_refused(
    adapter_scene: AdapterScene, tmp_path: Path
) -> None:
    adapter_scene.configure(modules_to_save=["lm_head"])
    adapter_scene.keep(**{f"{HEAD}.weight": ones(SIZE, WIDTH)})
    other = second(adapter_scene, tmp_path / "other")
    both = [adapter_scene.adapter, other]
    adapter_scene.refusal_of(both, None)

    file = other / "adapter_model.safetensors"
    saved = load_file(file)
    saved[f"{HEAD}.weight"][-1, -1] = 2
    save_file(saved, file)

    adapter_scene.refusal_of(both, "'base_model.model.lm_head.weight' should hold the values of")


def test_two_adapters_that_train_the_same_token_are_refused(
    adapter_scene: AdapterScene, tmp_path: Path
) -> None:
    adapter_scene.configure(trainable_token_indices=[1, 9])
    adapter_scene.keep(**{TOKENS: ones(2, WIDTH)})
    other = second(adapter_scene, tmp_path / "other")
    edit_json(other / "adapter_config.json", trainable_token_indices=[9, 4])

    said = "token 9 is trained by another adapter as well"
    adapter_scene.refusal_of([adapter_scene.adapter, other], said)
    edit_json(other / "adapter_config.json", trainable_token_indices=[8, 4])
    adapter_scene.refusal_of([adapter_scene.adapter, other], None)


@pytest.mark.parametrize(
    ("fields", "key", "shape"),
    [
        ({"modules_to_save": ["lm_head"]}, f"{HEAD}.weight", (SIZE, WIDTH)),
        ({"trainable_token_indices": [1, 2]}, TOKENS, (2, WIDTH)),
        ({"bias": "lora_only"}, BIAS, (32,)),
    ],
)
def test_a_weight_on_an_adapter_that_brings_whole_values_is_refused(
    adapter_scene: AdapterScene, fields: dict[str, Any], key: str, shape: tuple[int, ...]
) -> None:
    down = Q.replace("self_attn.q_proj", "mlp.down_proj")
    adapter_scene.keep(**{f"{P}{down}.lora_{x}.weight": None for x in "AB"})
    adapter_scene.configure(**fields)
    adapter_scene.keep(**{key: ones(*shape)})

    text = adapter_scene.refusal("@0.5")
    assert f"tensor {key!r}: brings whole values, which cannot count 0.5 times" in text


def test_tied_ends_that_were_resized_apart_are_refused(
    adapter_scene: AdapterScene, tmp_path: Path
) -> None:
    """modules_to_save trains the embeddings apart from the head, which then has too few rows."""
    tied = Geometry(layers=1, tied=True)
    adapter_scene.base = write_base(tmp_path / "tied", random_tensors(tied), tied.config)
    adapter_scene.configure(modules_to_save=["embed_tokens"])
    adapter_scene.keep(**{f"{EMBED}.weight": ones(SIZE + 2, WIDTH)})

    said = "the vocabulary is resized at one end only"
    adapter_scene.refusal_of([adapter_scene.adapter], said)


def test_a_file_of_tokens_alone_needs_nothing_else(adapter_scene: AdapterScene) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3], "target_modules": ["lm_head"]}
    (adapter_scene.adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"{HEAD}.trainable_tokens_delta": ones(1, WIDTH)},
        adapter_scene.adapter / "adapter_model.safetensors",
    )
    adapter_scene.refusal_of([adapter_scene.adapter], None)
    adapter_scene.configure(target_modules=["lm_head", "embed_tokens"])

    said = "trained tokens covers embed_tokens, for which the file holds nothing"
    adapter_scene.refusal_of([adapter_scene.adapter], said)
    adapter_scene.configure(r=8)
    adapter_scene.refusal_of([adapter_scene.adapter], "field 'r' = 8 is not known")


def test_factors_in_a_file_of_tokens_are_refused(adapter_scene: AdapterScene) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3]}
    (adapter_scene.adapter / "adapter_config.json").write_text(json.dumps(config))
    adapter_scene.keep(**{f"{EMBED}.trainable_tokens_delta": ones(1, WIDTH)})

    assert f"{QB!r} is a factor, and peft_type TRAINABLE_TOKENS has none" in adapter_scene.refusal()
