"""What ``verify`` refuses to check, by name, instead of passing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merged_by_hand import found, write_weights
from models import edit_json, make_adapter
from zero_adapters import BASE, Q, write_adapter

from merge_core.errors import InputError
from merge_core.stores.location import locate
from merge_core.verify import verify
from merge_core.verify.recipe import adapter_recipe


def test_what_cannot_be_asked_is_refused(finished: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="there is no level 'deep'"):
        verify(finished, "deep")
    with pytest.raises(InputError, match="it is no directory"):
        verify(finished / "config.json")
    with pytest.raises(InputError, match="no base: No such file"):
        verify(finished, "numeric", base=locate(finished / "nowhere"))
    with pytest.raises(InputError, match="no base: No such file"):
        verify(finished, "numeric", base=locate(adapter))
    (finished / ".raymeld" / "plan.json").unlink()
    with pytest.raises(InputError, match="level numeric needs base and adapters"):
        verify(finished, "numeric", base=locate(base))
    assert found(finished, "numeric", base=base, adapters=[(adapter, 1.0)]) == []
    assert found(finished, "digest") == []


def test_an_adapter_that_cannot_be_checked_is_refused(
    finished: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    qalora = make_adapter(tmp_path / "qalora", base, target_modules=["q_proj"])
    edit_json(qalora / "adapter_config.json", use_qalora=True)

    with pytest.raises(InputError) as caught:
        verify(finished, "numeric", adapters=[(adapter, 1.0), (qalora, 1.0)])

    assert str(caught.value.problems[0]).startswith(f"{qalora}: cannot check use_qalora = ")
    assert len(caught.value.problems) == 1


REFUSED = {
    "peft_type": 7,
    "modules_to_save": "lm_head",
    "trainable_token_indices": [-1],
    "target_parameters": "mlp.experts.gate_up_proj",
    "init_lora_weights": "pissa",
    "use_bdlora": {"nblocks": 2, "taper": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
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
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    [problem] = caught.value.problems
    assert problem.where == str(path)
    assert problem.what.startswith("cannot check ")
    assert field in problem.what


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.lora_diag",
        f"base_model.model.{Q}.base_layer.lora_B.bias",
        f"base_model.model.{Q}.lora_A.default.weight",
        f"base_model.model.{Q}.lora_A.bias",
        f"{Q}.lora_A.weight",
    ],
)
def test_tensors_that_cannot_be_checked_are_named(key: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {})
    write_weights(path / "adapter_model.safetensors", {key: torch.zeros(8, 6)})

    with pytest.raises(InputError) as caught:
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    assert str(caught.value).startswith(f"{path}: cannot check tensor {key!r}")


def test_everything_is_refused_at_once(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {Q: 8}, use_qalora=True, use_bdlora={"taper": 1})

    with pytest.raises(InputError) as caught:
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    assert sorted(p.what for p in caught.value.problems) == [
        "cannot check use_bdlora = {'taper': 1}",
        "cannot check use_qalora = True",
    ]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {Q: 8})

    (path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="the adapter's config cannot be read"):
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    write_adapter(path, {Q: 8})
    (path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="the adapter's weights cannot be read"):
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    write_weights(path / "adapter_model.safetensors", {"k": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(InputError, match="cannot check tensor 'k' of dtype I64"):
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it holds no adapter_model.safetensors or .bin"):
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")


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
        adapter_recipe(locate(path), 1.0, BASE, "qwen2")
