"""Model cards: what the hub shows of a merge, and links it by; and what becomes of the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from handmade import TWO_LANES, random_tensors, write_base
from hub_server import Hub
from huggingface_hub import ModelCard
from pushes import head, push
from trainers import SMALL, adapter_at

from merge_core import __version__
from merge_core.merge import merge
from merge_core.model_card import Lineage, Origin, model_card
from merge_core.planner import make_plan
from merge_core.verify import verify

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

The licence, in full.
"""


def lineage(base: str, *adapters: str) -> Lineage:
    return Lineage(
        base=Origin.of(base),
        adapters=tuple(Origin.of(each, 0.5) for each in adapters),
        method="ties",
        raymeld="1.2",
        options={},
        tensors=(3, 5),
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

Made by raymeld 1.2, which combined them by `ties`. It was verified before its `config.json` was \
written.

## Recipe

```yaml
base: Qwen/Qwen1.5-7B
adapters:
- path: me/lora
  weight: 0.5
- path: mine
  weight: 0.5
```

## Checks

- 3 of 5 tensors changed; all others are the base's bytes.
- `.raymeld/ledger.parquet`: by how much each changed, and the digest of each.
- `.raymeld/verified.json`: what was verified, at which level.
- `raymeld verify` does it again.
"""
    )


def test_a_path_in_the_cache_is_known_to_be_of_the_hub() -> None:
    path = f"/home/me/.cache/huggingface/hub/models--Qwen--Qwen1.5-7B/snapshots/{COMMIT}"
    assert Origin.of(path) == Origin(name="Qwen/Qwen1.5-7B", revision=COMMIT)
    assert Origin.of("/data/Qwen1.5-7B") == Origin(name="Qwen1.5-7B", revision=None)
    assert Origin.of("s3://bucket/models/q") == Origin(name="q", revision=None)
    assert Origin.of("/data/`x`](http://evil)") == Origin(name="evil_", revision=None)


@pytest.mark.parametrize(
    "card",
    [
        *(None, "", "# no metadata", "---\n[\n---\n", "---\n- a\n---\n", "---\n---\n"),
        *("---\nlicense: {a: b}\n---\n", "---\nlicense: !!python/name:os.system x\n---\n"),
        BASE_CARD,
    ],
)
def test_a_card_of_a_base_that_is_elsewhere_links_nothing(card: str | None) -> None:
    data = ModelCard(model_card("m", lineage("/data/base", "hf://me/lora"), card)).data
    assert (data.base_model, data.get("base_model_relation")) == (None, None)
    assert data.license == ("other" if card == BASE_CARD else None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = write_base(tmp_path / "Qwen1.5-7B", random_tensors(SMALL), SMALL.config)
    (path / "README.md").write_text(BASE_CARD)
    (path / "LICENSE").write_text("terms")
    return path


def merge_at(out: Path, base: Path, adapters: list[str], **options: object) -> Path:
    plan = make_plan(base, adapters, **options)  # type: ignore[arg-type]
    merge(plan, out, device="cpu", choice=TWO_LANES, level="numeric")
    return out


def test_every_merge_has_its_card(base: Path, tmp_path: Path) -> None:
    one = adapter_at(tmp_path / "style", base_model_name_or_path="Qwen/Qwen1.5-7B")
    two = adapter_at(tmp_path / "facts", seed=2)
    out = merge_at(tmp_path / "out", base, [f"{one}@0.5", str(two)], dtype="float32")
    text = (out / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (["Qwen/Qwen1.5-7B"], "merge")
    assert (data.license, data.license_name) == ("other", "tongyi-qianwen")
    assert str(tmp_path) not in text
    assert (
        text.partition("\n---\n")[2]
        == f"""
# Qwen1.5-7B with 2 adapters

[Qwen/Qwen1.5-7B](https://huggingface.co/Qwen/Qwen1.5-7B), with these adapters merged into it:

- `style`, weight 0.5
- `facts`, weight 1

Made by raymeld {__version__}, which combined them by `sum`. It was verified before its \
`config.json` was written.

## Recipe

```yaml
base: Qwen/Qwen1.5-7B
adapters:
- path: style
  weight: 0.5
- path: facts
  weight: 1.0
dtype: float32
shard_size: '2000000000'
combine: sum
```

## Checks

- 15 of 15 tensors changed; all others are the base's bytes.
- `.raymeld/ledger.parquet`: by how much each changed, and the digest of each.
- `.raymeld/verified.json`: what was verified, at which level.
- `raymeld verify` does it again.
"""
    )
    again = merge_at(tmp_path / "again", base, [f"{one}@0.5", str(two)], dtype="float32")
    assert (again / "README.md").read_text() == text


def test_the_licence_of_the_base_stays_in_a_merge_of_a_merge(base: Path, tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "lora")
    out = merge_at(tmp_path / "out", base, [str(adapter)])
    assert (out / "README.base.md").read_text() == BASE_CARD
    assert (out / "LICENSE").read_text() == "terms"
    again = merge_at(tmp_path / "again", out, [str(adapter)])
    assert (again / "README.base.base.md").read_text() == BASE_CARD
    assert (again / "README.base.md").read_text() == (out / "README.md").read_text()
    assert ModelCard((again / "README.md").read_text()).data.license == "other"


def test_a_card_may_be_written_on_and_what_is_carried_may_not(base: Path, tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "lora")
    out = merge_at(tmp_path / "out", base, [str(adapter)])
    plan = json.loads((out / ".raymeld" / "plan.json").read_bytes())
    assert plan["side_files"] == ["README.md", "LICENSE", "README.base.md", "tokenizer.json"]
    (out / "README.md").write_text("my own words")
    assert verify(out, "numeric").ok
    result = merge(make_plan(base, [adapter]), out)
    assert result.receipts == ()  # it is the same merge still
    (out / "README.base.md").write_text("no terms at all")
    assert [finding.check for finding in verify(out, "numeric").findings] == ["digest", "base"]
    plain = adapter_at(tmp_path / "other", seed=9)
    merge(make_plan(base, [plain]), out, overwrite=True)
    assert "with other" in (out / "README.md").read_text()


def test_a_name_on_the_hub_is_told_where_it_is_surely_the_bases(base: Path, tmp_path: Path) -> None:
    for named, told in (
        ("Qwen/Qwen1.5-7B", "[Qwen/Qwen1.5-7B]"),
        ("Qwen/Qwen1.5-4B", "`Qwen1.5-7B`"),
        ("unsloth/Qwen1.5-7B-bnb-4bit", "`Qwen1.5-7B`"),
        ("/models/Qwen1.5-7B", "`Qwen1.5-7B`"),
    ):
        adapter = adapter_at(tmp_path / "lora", base_model_name_or_path=named)
        assert f"\n{told}" in make_plan(base, [adapter]).card


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_hub_gets_that_card_with_what_it_has_in_place_of_the_record(
    base: Path, tmp_path: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    adapter = adapter_at(tmp_path / "style", base_model_name_or_path="Qwen/Qwen1.5-7B")
    out, said = merge_at(tmp_path / "out", base, [str(adapter)]), list[str]()
    push(out, said=said)
    files = head(hub.repos["me/merge"])
    mine, theirs = ((text.splitlines()) for text in (own(out), files["README.md"].decode()))
    assert (mine[:-3], mine[-3][:12]) == (theirs[:-2], "- `.raymeld/")
    assert theirs[-2:] == [
        "- It was verified at level `numeric` before it was published.",
        "- `raymeld.json`: what it was made of, and the sha256 of every file.",
    ]
    assert files["README.base.md"].decode() == BASE_CARD
    assert str(tmp_path) not in files["raymeld.json"].decode()
    assert not [line for line in said if "names no base" in line]

    (out / "README.md").write_text("my own words")
    push(out, said=said)
    assert head(hub.repos["me/merge"])["README.md"] == b"my own words"
    assert said[-1] == "the model card names no base on the hub: BASE was none"


def own(out: Path) -> str:
    return (out / "README.md").read_text()
