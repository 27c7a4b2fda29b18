"""What trainers leave, tokenizers, cards and recipes where no path leads: in stores, on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from handmade import TWO_LANES, random_tensors, write_base
from hub_client import HubClient
from hub_server import Hub
from models import edit_json
from trainers import SMALL, adapter_at, swift, swift_2, tokenizer_at, trainer
from typer.testing import CliRunner

from cluster.cli import app
from cluster.recipe import read_recipe
from merge_core.errors import InputError, RaymeldError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.stores.location import Location, locate
from merge_core.stores.opening import open_store, read_file
from merge_core.trainer_output import split_words
from merge_core.verify import verify


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tokenizer_at(write_base(tmp_path / "Qwen1.5-7B", random_tensors(SMALL), SMALL.config))
    (path / "README.md").write_text("---\nlicense: other\n---\n")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def space(tmp_path: Path) -> Location:
    """In a store of this process, of this test alone."""
    return locate(f"memory://{tmp_path.name}")


def stored(folder: Path, place: Location) -> Location:
    for name, data in files_of(folder).items():
        open_store(place).put(name, data)
    return place


def contents(out: Location) -> dict[str, bytes]:
    """Of a result, without what raymeld keeps of it."""
    names = [one.name for one in open_store(out).list() if not one.name.startswith(".")]
    return {name: read_file(out / name) for name in names}


def test_a_trainers_output_in_a_store_makes_the_same_as_on_a_disk(
    base: Path, tmp_path: Path, space: Location
) -> None:
    output = tokenizer_at(trainer(tmp_path / "output"), ("<a>",))
    there = stored(base, space / "Qwen1.5-7B"), stored(output, space / "output")
    results = []
    for one, other, out in (
        (base, output, locate(tmp_path / "out")),
        (*there, space / "out"),
    ):
        plan = make_plan(one, [(other, 0.5)], adapter_name="checkpoint-10")
        assert plan.adapters[0].path == locate(other) / "checkpoint-10"
        merge(plan, out, device="cpu", choice=TWO_LANES, level="numeric")
        assert merge(plan, out).receipts == ()  # it is the same merge
        results.append(contents(out))
    assert results[0] == results[1]
    assert json.loads(results[1]["tokenizer.json"])["added_tokens"][0]["content"] == "<a>"
    assert results[1]["README.base.md"] == (base / "README.md").read_bytes()

    template = bytes(len(results[1]["chat_template.jinja"]))
    open_store(there[1]).put("chat_template.jinja", template)
    (finding,) = verify(space / "out", "numeric").findings
    assert str(finding) == f"base: chat_template.jinja: it differs from that of {there[1]}"
    with pytest.raises(RaymeldError, match="from input files of other times"):
        merge(make_plan(there[0], [(there[1], 0.5)], adapter_name="checkpoint-10"), space / "out")


def test_several_adapters_in_a_store_are_listed(
    base: Path, tmp_path: Path, space: Location
) -> None:
    run = stored(swift(tmp_path / "output"), space / "output")
    with pytest.raises(InputError, match="holds 2 adapters: checkpoint-20, checkpoint-100"):
        make_plan(base, [run])
    one = stored(swift_2(tmp_path / "checkpoint-3"), space / "checkpoint-3")
    plan = make_plan(base, [one])
    assert plan.notes == (f"{one}: the one adapter in it is default",)


def test_the_first_word_may_be_an_adapter_in_a_store(
    base: Path, tmp_path: Path, space: Location
) -> None:
    inside, outside = stored(base, space / "base"), stored(swift(tmp_path / "x"), space / "run")
    for words, has_base in (
        ([f"{outside}@0.5"], False),
        ([str(outside), str(outside)], False),
        ([str(inside), str(outside)], True),
        ([str(inside)], True),
        ([f"{space}/nowhere", str(outside)], True),
    ):
        wanted = (words[0], words[1:]) if has_base else (None, words)
        assert split_words(words) == wanted


def test_the_recipe_that_is_kept_in_a_store_makes_the_same_bytes_again(
    base: Path, tmp_path: Path, space: Location
) -> None:
    output = stored(tokenizer_at(trainer(tmp_path / "output"), ("<a>",)), space / "output")
    words = [str(stored(base, space / "Qwen1.5-7B")), f"{output}@0.5", "--tokenizer", str(output)]
    options = ["--address", "inline", "--quiet"]
    run("merge", *words, "--out", f"{space}/out", *options)
    kept = tmp_path / "recipe.yaml"
    kept.write_bytes(read_file(space / "out" / ".raymeld" / "recipe.yaml"))
    assert read_recipe(kept).options["tokenizer"] == str(output)
    run("merge", str(kept), "--out", f"{space}/again", *options)
    assert contents(space / "again") == contents(space / "out")


def test_an_s3_is_named_in_the_recipe_of_what_is_read_from_it(
    base: Path, tmp_path: Path, s3: Location
) -> None:
    adapter, out = stored(adapter_at(tmp_path / "lora"), s3 / "lora"), tmp_path / "out"
    endpoint = str(s3.access.endpoint_url)
    options = ["--address", "inline", "--quiet", "--endpoint-url", endpoint]
    run("merge", str(base), str(adapter), "--out", str(out), *options)
    kept = out / ".raymeld" / "recipe.yaml"
    assert read_recipe(kept).options["endpoint_url"] == endpoint
    assert endpoint not in (out / "README.md").read_text()
    run("merge", str(kept), "--out", f"{s3}/again", "--address", "inline", "--quiet")
    assert contents(s3 / "again") == contents(locate(out))


def run(*words: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_a_base_that_is_not_on_the_disk_is_taken_from_the_hub(
    base: Path,
    tmp_path: Path,
    hub: Hub,
    client: HubClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    repo = hub.repo("org/Qwen1.5-7B", files_of(base))
    old = repo.refs["main"]
    adapter = adapter_at(tmp_path / "lora", base_model_name_or_path="org/Qwen1.5-7B")
    new = repo.commit({"README.md": b"---\nlicense: mit\n---\n"})

    plan = make_plan(None, [adapter])
    assert str(plan.base) == f"hf://org/Qwen1.5-7B@{new}"
    said = "BASE is the one that the adapters name, which is not on this disk: hf://org/Qwen1.5-7B"
    assert plan.notes[0] == said
    assert plan.recipe["base"] == str(plan.base)
    assert "license: mit" in plan.card

    edit_json(adapter / "adapter_config.json", revision=old)  # as PEFT means it
    assert make_plan(None, [adapter]).base.revision == old
    other = adapter_at(tmp_path / "other", base_model_name_or_path="org/Qwen1.5-7B")
    with pytest.raises(InputError, match="on 2 different bases"):
        make_plan(None, [adapter, other])

    (tmp_path / "org").mkdir()  # which makes a mistyped path of a word, but not of a name
    assert make_plan(None, [other]).base.root == "org/Qwen1.5-7B"
    shutil.copytree(base, tmp_path / "org" / "Qwen1.5-7B")  # a path that exists comes first
    assert make_plan(None, [adapter]).base.local == tmp_path / "org" / "Qwen1.5-7B"


def test_who_is_sent_to_the_hub_without_having_asked_is_told_why(
    base: Path, tmp_path: Path, hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = adapter_at(tmp_path / "lora", base_model_name_or_path="org/base")
    named = "(BASE is the one that the adapters name, which is not on this disk: hf://org/base)"
    typed = "(there is no path org/base: it is taken for a model on the hub)"
    for words, why in (
        ((None, [adapter]), named),
        (("org/base", [adapter]), typed),
        ((base, ["org/base@0.5"]), typed.replace("/base:", "/base@0.5:")),
    ):
        with pytest.raises(InputError) as caught:
            make_plan(*words)
        assert str(caught.value).count(why) == 1
    with pytest.raises(InputError) as caught:
        make_plan("hf://org/base", [adapter])
    assert " (" not in str(caught.value)


def test_an_adapter_and_its_tokenizer_on_the_hub_are_pinned(
    base: Path, tmp_path: Path, hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tokenizer_at(trainer(tmp_path / "output"), ("<a>",))
    commit = hub.repo("me/style", files_of(output)).refs["main"]
    whole = f"hf://me/style@{commit}"

    plan = make_plan(base, ["me/style@0.5"], adapter_name="checkpoint-5", tokenizer="me/style")

    assert str(plan.adapters[0].path) == f"{whole}/checkpoint-5"
    assert plan.recipe["adapters"] == [{"path": whole, "weight": 0.5}]
    assert plan.recipe["tokenizer"] == whole
    assert {str(side.folder) for side in plan.side_files if side.name == "tokenizer.json"} == {
        whole
    }
    assert plan.notes[0] == "there is no path me/style@0.5: it is taken for a model on the hub"
    assert "base_model" not in plan.card  # of a base that is not known there
