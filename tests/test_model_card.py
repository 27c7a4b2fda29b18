"""Model cards: what the hub shows of a merge, and links it by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from hub_client import HubClient
from hub_server import Hub
from huggingface_hub import ModelCard
from pushes import head, push

from merge_core.model_card import Lineage, Origin, model_card

COMMIT = "a" * 40
BASE_CARD = """---
license: other
license_name: tongyi-qianwen
license_link: https://huggingface.co/Qwen/Qwen1.5-7B/blob/main/LICENSE
language:
- en
pipeline_tag: text-generation
tags:
- pretrained
extra_gated_prompt: Accept this
---

# Qwen1.5-7B
"""


def lineage(base: str, *adapters: str) -> Lineage:
    return Lineage(
        base=Origin.of(base),
        adapters=tuple(Origin.of(each, 0.5) for each in adapters),
        method="ties",
        raymeld="1.2",
        level="numeric",
    )


def test_a_card_names_and_links_what_is_on_the_hub() -> None:
    made = lineage(f"hf://Qwen/Qwen1.5-7B@{COMMIT}", "hf://me/lora@v2/best", "/secret/place/mine")
    text = model_card("merge", made, BASE_CARD)
    assert ModelCard(text).data.to_dict() == {
        "base_model": ["Qwen/Qwen1.5-7B", "me/lora"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "peft", "raymeld"],
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "https://huggingface.co/Qwen/Qwen1.5-7B/blob/main/LICENSE",
        "language": ["en"],
        "pipeline_tag": "text-generation",
    }
    assert (
        text.partition("\n---\n")[2]
        == f"""
# merge

[Qwen/Qwen1.5-7B](https://huggingface.co/Qwen/Qwen1.5-7B) at `{COMMIT}`, \
with these adapters merged into it:

- [me/lora](https://huggingface.co/me/lora) at `v2`, weight 0.5
- `mine`, weight 0.5

Made by raymeld 1.2, which combined them by `ties`, and verified at level `numeric` before it was \
published. `raymeld.json` has the recipe, and the sha256 of every file.
"""
    )


def test_a_path_in_the_cache_is_known_to_be_of_the_hub() -> None:
    path = f"/home/me/.cache/huggingface/hub/models--Qwen--Qwen1.5-7B/snapshots/{COMMIT}"
    assert Origin.of(path) == Origin(name="Qwen/Qwen1.5-7B", revision=COMMIT)
    assert Origin.of("/data/Qwen1.5-7B") == Origin(name="Qwen1.5-7B", revision=None)
    assert Origin.of("s3://bucket/models/q") == Origin(name="q", revision=None)
    assert Origin.of("/data/`x`](http://evil)") == Origin(name="evil_", revision=None)


@pytest.mark.parametrize(
    "card", [None, "", "# no metadata", "---\n[\n---\n", "---\n- a\n---\n", "---\n---\n", BASE_CARD]
)
def test_a_card_of_a_base_that_is_elsewhere_links_nothing(card: str | None) -> None:
    data = ModelCard(model_card("m", lineage("/data/base", "hf://me/lora"), card)).data
    assert (data.base_model, data.get("base_model_relation")) == (None, None)
    assert data.license == ("other" if card == BASE_CARD else None)


def on_hub(merged: Path, tmp_path: Path) -> Path:
    """A merge whose plan says that the base came from the hub."""
    out = shutil.copytree(merged, tmp_path / "copy")
    plan = json.loads((out / ".raymeld" / "plan.json").read_bytes())
    plan["base"] = "hf://Qwen/base"
    (out / ".raymeld" / "plan.json").write_text(json.dumps(plan))
    return out


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_merge_has_the_card_with_the_licence_of_its_base(
    merged: Path, tmp_path: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    hub.repo("Qwen/base", {"README.md": BASE_CARD.encode()})
    push(on_hub(merged, tmp_path))
    data = ModelCard(head(hub.repos["me/merge"])["README.md"].decode()).data
    assert (data.base_model, data.license) == (["Qwen/base"], "other")
    recipe = head(hub.repos["me/merge"])["raymeld.json"].decode()
    assert str(tmp_path) not in recipe + str(data)
    assert json.loads(recipe)["base"] == {"name": "Qwen/base", "revision": "main"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_base_card_that_cannot_be_read_is_said(
    merged: Path, tmp_path: Path, hub: Hub, before_hub: FaultProxy, client: HubClient
) -> None:
    hub.repo("Qwen/base", {"README.md": BASE_CARD.encode()}, granted=set())
    said: list[str] = []
    push(on_hub(merged, tmp_path), said=said)
    assert said[-1].startswith("the model card says nothing of licence and language: hf://Qwen/ba")
