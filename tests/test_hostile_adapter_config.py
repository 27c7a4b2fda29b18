"""An adapter_config.json with malformed, unknown or unmerged fields is refused by name."""

from __future__ import annotations

import reprlib

import pytest
from scenes import AdapterScene

from merge_core.planner import make_plan
from merge_core.refused_tuners import REFUSED, REFUSED_VARIANTS


@pytest.mark.parametrize("value", [True, 0.5, "x", [1], {"a": 1}])
def test_an_unknown_config_field_with_a_value_is_refused(
    adapter_scene: AdapterScene, value: object
) -> None:
    adapter_scene.configure(use_next_great_thing=value)
    assert f"field 'use_next_great_thing' = {value!r} is not known" in adapter_scene.refusal()


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_config_field_that_is_off_is_accepted(
    adapter_scene: AdapterScene, value: object
) -> None:
    adapter_scene.configure(use_next_great_thing=value)
    assert len(make_plan(adapter_scene.base, [adapter_scene.adapter]).adapters) == 1


def test_an_unknown_config_field_of_zero_is_refused(adapter_scene: AdapterScene) -> None:
    adapter_scene.configure(next_scale=0)
    assert "field 'next_scale' = 0 is not known" in adapter_scene.refusal()


@pytest.mark.parametrize(("field", "why"), REFUSED_VARIANTS.items())
def test_a_feature_in_the_config_is_refused_by_name(
    adapter_scene: AdapterScene, field: str, why: str
) -> None:
    adapter_scene.configure(**{field: ["x"]})
    assert f"{field} is set: {why}" in adapter_scene.refusal()
    adapter_scene.configure(**{field: None})
    assert len(make_plan(adapter_scene.base, [adapter_scene.adapter]).adapters) == 1


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "new"])
def test_an_initialisation_that_changed_the_base_is_refused_with_the_way_out(
    adapter_scene: AdapterScene, init: str
) -> None:
    adapter_scene.configure(init_lora_weights=init)
    text = adapter_scene.refusal()
    assert f"init_lora_weights={init!r} may change the base weights" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize(("kind", "why"), REFUSED.items())
def test_a_tuner_that_cannot_be_merged_is_refused_by_name(
    adapter_scene: AdapterScene, kind: str, why: str
) -> None:
    adapter_scene.configure(peft_type=kind)
    assert f"peft_type {kind} is not merged: {why}" in adapter_scene.refusal()


@pytest.mark.parametrize("kind", ["LORAX", "lora", "", None, 7, ["LORA"], {"LORA": 1}])
def test_what_is_no_tuner_is_refused(adapter_scene: AdapterScene, kind: object) -> None:
    adapter_scene.configure(peft_type=kind)
    assert f"peft_type is {kind!r}, which is no PEFT type" in adapter_scene.refusal()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, -1, "8", True, 8.0, None, [8], 10**400]),
        ("lora_alpha", [None, float("nan"), float("inf"), "16", True, 10**400]),
        ("use_rslora", ["true", 1]),
        ("fan_in_fan_out", ["false", 0]),
        ("use_dora", ["true", 1]),
        ("lora_bias", ["true", 1]),
        ("ensure_weight_tying", ["true", 1]),
        ("bias", ["some", True, None, ["all"]]),
        ("modules_to_save", ["lm_head", [1], [""], {"lm_head": 1}]),
        ("trainable_token_indices", [1, [1.0], [-1], [True], [3, 4, 3], {"": [1]}, {"wte": 1}]),
        ("trainable_token_indices", [[10**10], {"wte": [2, 2]}]),
        ("rank_pattern", [[8], "q_proj", {"q_proj": 0}, {"q_proj": "8"}, {"(": 8}, {"[": 8}]),
        ("alpha_pattern", [[8], {"q_proj": None}, {"q_proj": float("nan")}, {"*": 8}]),
    ],
)
def test_malformed_values_are_refused(
    adapter_scene: AdapterScene, field: str, values: list[object]
) -> None:
    for value in values:
        adapter_scene.configure(**{field: value})
        assert f"{field} is {reprlib.repr(value)}, not " in adapter_scene.refusal()


@pytest.mark.parametrize(
    "pattern",
    ["(.|.)*!", "((a|b))+x", "(a+)+$", ".*" * 10 + "!", r"\w+.*\d*.*x", ".?" * 30 + "!"],
)
def test_a_pattern_that_could_match_for_ever_is_refused(
    adapter_scene: AdapterScene, pattern: str
) -> None:
    adapter_scene.configure(alpha_pattern={pattern: 5})
    assert "which may take for ever to match" in adapter_scene.refusal()


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|1[0-9]?|2[0-3]?)\..*_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o)_proj",
        r"^model\.(?:layers\.)?[+*?]?.*?q_proj",
    ],
)
def test_patterns_that_people_write_are_taken(adapter_scene: AdapterScene, pattern: str) -> None:
    adapter_scene.configure(alpha_pattern={pattern: 5})
    adapter_scene.merge()


def test_what_somebody_wrote_is_shortened_in_the_message(adapter_scene: AdapterScene) -> None:
    adapter_scene.configure(unheard_of="x" * 10_000_000, r="y" * 10_000_000)
    assert len(adapter_scene.refusal()) < 1000


@pytest.mark.parametrize("config", [b"{", b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(adapter_scene: AdapterScene, config: bytes) -> None:
    (adapter_scene.adapter / "adapter_config.json").write_bytes(config)
    assert "adapter_config.json: is no JSON" in adapter_scene.refusal()
