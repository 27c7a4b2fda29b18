"""A config.json that describes no model, or another than the weights, is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scenes import BaseScene


@pytest.mark.parametrize(
    ("quantisation", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"load_in_8bit": True}, "unknown method"),
        ("int4", "unknown method"),
    ],
)
def test_a_quantised_base_is_refused_by_name(
    scene: BaseScene, quantisation: object, name: str
) -> None:
    scene.configure(quantization_config=quantisation)
    assert f"config.json: the base is quantised ({name})" in scene.refusal()


@pytest.mark.parametrize("config", [b"{", b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_a_config_that_describes_no_model_is_refused(scene: BaseScene, config: bytes) -> None:
    (scene.base / "config.json").write_bytes(config)
    assert "config.json" in scene.refusal()


def test_a_missing_config_is_refused(scene: BaseScene) -> None:
    (scene.base / "config.json").unlink()
    assert "config.json: cannot be read (No such file" in scene.refusal()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"num_hidden_layers": 0},
        {"num_attention_heads": -4},
        {"head_dim": "8", "num_key_value_heads": "2"},
        {"head_dim": {"x": 1}},
        {"num_key_value_heads": 1.5},
    ],
)
def test_sizes_in_the_config_that_are_no_sizes_are_refused(
    scene: BaseScene, sizes: dict[str, object]
) -> None:
    scene.configure(**sizes)
    assert str(scene.base) in scene.refusal()


def test_a_config_that_asks_for_a_billion_layers_costs_no_memory(scene: BaseScene) -> None:
    scene.configure(num_hidden_layers=10**9)
    code = (
        "import resource, sys; from merge_core.planner import make_plan\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({600 << 20}, {600 << 20}))\n"
        "try: make_plan(sys.argv[1], [sys.argv[2]])\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, scene.base, scene.adapter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-300:]
    assert "1000000000" in done.stdout


def test_a_base_of_another_size_than_its_config_is_refused(scene: BaseScene) -> None:
    scene.configure(num_hidden_layers=3, vocab_size=81)
    text = scene.refusal()
    assert "the checkpoint lacks model.layers.1.self_attn.q_proj.weight" in text
    assert "and 21 more" in text
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"tensor {name!r} has shape [80, 32], config.json asks [81, 32]" in text
