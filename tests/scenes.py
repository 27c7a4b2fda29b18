"""Small merges of which a test spoils something, and what they are then refused with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from handmade import (
    INDEX,
    TWO_LANES,
    Geometry,
    files_below,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
    write_json,
)
from models import edit_json
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.factors import seal
from merge_core.merge import MergeResult, merge
from merge_core.planner import make_plan

SMALL = Geometry(layers=1)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
QA, QB = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


@dataclass
class Scene:
    """A merge, of which each test spoils something."""

    base: Path
    adapter: Path
    out: Path

    def merge(self, weight: str = "", *, overwrite: bool = False) -> MergeResult:
        plan = make_plan(self.base, [f"{self.adapter}{weight}"])
        return merge(plan, self.out, device="cpu", choice=TWO_LANES, overwrite=overwrite)

    def refusal(self, weight: str = "", *, overwrite: bool = False) -> str:
        """What the merge is refused with; OUT is as it was."""
        before = files_below(self.out) if self.out.is_dir() else self.out.exists()
        with pytest.raises(InputError) as caught:
            self.merge(weight, overwrite=overwrite)
        assert caught.value.exit_code == 2
        assert before == (files_below(self.out) if self.out.is_dir() else self.out.exists())
        text = str(caught.value)
        text.encode()  # can be printed
        return text


class BaseScene(Scene):
    """Its base, of two files, can be changed."""

    @classmethod
    def make(cls, path: Path, out: Path) -> BaseScene:
        base = write_base(path / "base", random_tensors(SMALL), SMALL.config, files=2)
        return cls(base, adapter_of(SMALL, path / "adapter"), out)

    def map_tensor(self, name: str, home: object) -> None:
        index = json.loads((self.base / INDEX).read_text())
        write_json(self.base / INDEX, {"weight_map": {**index["weight_map"], name: home}})

    def configure(self, **fields: object) -> None:
        edit_json(self.base / "config.json", **fields)


class AdapterScene(Scene):
    """Its adapter can be changed, and every refusal names it."""

    @classmethod
    def make(cls, path: Path, out: Path) -> AdapterScene:
        base = write_base(path / "base", random_tensors(SMALL), SMALL.config)
        factors = random_factors(SMALL.linear, {Q: 4, DOWN: 4})
        return cls(base, write_adapter(path / "adapter", factors, r=4, lora_alpha=8), out)

    def refusal(self, weight: str = "", *, overwrite: bool = False) -> str:
        text = super().refusal(weight, overwrite=overwrite)
        assert not self.out.exists()
        assert str(self.adapter) in text
        return text

    def refusal_of(self, adapters: Sequence[Path], said: str | None) -> None:
        """Several adapters are refused with that, or are not if ``said`` is None."""
        if said is None:
            seal(make_plan(self.base, adapters))
            return
        with pytest.raises(InputError) as caught:
            seal(make_plan(self.base, adapters))
        assert said in str(caught.value)

    def configure(self, **fields: object) -> None:
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        write_json(self.adapter / "adapter_config.json", {**config, **fields})

    def keep(self, **tensors: torch.Tensor | None) -> None:
        """Change tensors of the weight file; None removes one."""
        file = self.adapter / "adapter_model.safetensors"
        changed = {**load_file(file), **tensors}
        save_file({k: v for k, v in changed.items() if v is not None}, file)


def adapter_of(geometry: Geometry, path: Path, seed: int = 1) -> Path:
    factors = random_factors(geometry.linear, {Q: 4}, seed=seed)
    return write_adapter(path, factors, r=4, lora_alpha=8)
