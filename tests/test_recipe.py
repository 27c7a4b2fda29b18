"""Recipes as text: what is read from them, every mistake by line and column, and the schema."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app, merge
from cluster.option_groups import options_of
from cluster.plan_options import PlanOptions
from cluster.recipe import Recipe, read_recipe
from cluster.recipe_model import NO_FIELDS, recipe_model, recipe_schema
from cluster.yaml_text import read_yaml
from merge_core.errors import InputError
from merge_core.stores.location import Access, locate

SCHEMA = Path(__file__).parent.parent / "docs" / "recipe.schema.json"

TEN_MISTAKES = """\
bse: /models/base
adapters:
  - path: lora
    wieght: 0.5
  - 7
dytpe: bfloat16
combine: tie
density: many
keep_tied: perhaps
workers: 0
export_dir: merged
shard_size: large
"""


def recipe(path: Path, text: str) -> Recipe:
    file = path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def refusals(path: Path, text: str) -> list[str]:
    """What is wrong, without the path."""
    with pytest.raises(InputError) as caught:
        recipe(path, text)
    return [str(problem).removeprefix(f"{path}/recipe.yaml:") for problem in caught.value.problems]


def test_ten_mistakes_are_ten_lines(tmp_path: Path) -> None:
    values, neither = "is none of its values", "is neither a path nor a path with a weight"
    assert refusals(tmp_path, TEN_MISTAKES) == [
        "1:1: there is no option 'bse'. Did you mean base?",
        "4:5: there is no option 'wieght'. Did you mean weight?",
        f"5:5: adapters, number 2: 7 {neither}. Give - path: and weight:",
        "6:1: there is no option 'dytpe'. Did you mean dtype?",
        f"7:10: combine: 'tie' {values}. Did you mean ties?",
        "8:10: density: 'many' is no number. Give one such as 0.5",
        "9:12: keep_tied: 'perhaps' is neither true nor false. Give one of them",
        "10:10: workers: 0 is too small. Give at least 1",
        "11:1: there is no option 'export_dir'. Did you mean out?",
        "12:13: shard_size: 'large' is no size. Give a size such as 2GB",
    ]


def test_the_command_tells_all_of_them_and_asks_for_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TEN_MISTAKES)
    done = CliRunner().invoke(app, ["merge", f"{tmp_path}/recipe.yaml", "--json"])
    assert done.exit_code == 2
    assert "10 problems" in json.loads(done.stdout)["error"]
    assert f"{tmp_path}/recipe.yaml:6:1: there is no option 'dytpe'" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no mapping of options to values"),
        ("- a", "is no mapping of options to values"),
        ("out: x", "1:1: adapters is missing"),
        ("adapters: []", "1:11: adapters is empty. Name at least one"),
        ("adapters: lora", "1:11: adapters: 'lora' is no list"),
        ("adapters: [a]\nadapters: [b]", "2:1: 'adapters' for the second time; the first"),
        ("adapters: [a\nout: x", "2:4: while parsing a flow sequence"),
        ("adapters: [&a x, *a]", "1:12: an alias, which recipes have not"),
        ("adapters: [!!python/name:os.system x]", "the tag 'tag:yaml.org,2002:python/name:os.sys"),
        ("adapters: [a]\n1: x", "2:1: there is no option '1'"),
        ("adapters: [a]\n? [b]\n: c", "2:3: a key that is no text"),
        ("adapters: [a]\nout: \a", "1:1: unacceptable character"),
        ("adapters: " + "[" * 40 + "]" * 40, "nested more than 20 deep"),
        ("adapters: [a]\nseed: 1.5", "2:7: seed: 1.5 is no whole number"),
        ("adapters: [a]\ndensity: 7", "2:10: density: 7 is no share of the elements. Give a"),
        ("adapters: [a]\nlayers: 9-3", "2:9: layers: '9-3' names no layers. Give numbers and rang"),
        ("adapters: [a]\nlayers: 1,x", "2:9: layers: 'x' names no layers. Give numbers and ranges"),
        ("adapters: [a]\nworkers: true", "2:10: workers: true is no number. Give one"),
        ("adapters: [{path: a, weight: false}]", "1:30: weight: false is no number. Give one"),
        ("adapters: [{weight: 1}]", "1:12: path is missing"),
        ("adapters: [a]\ntemplate: qwen", "2:1: there is no option 'template'. Leave it out"),
    ],
)
def test_what_is_no_recipe_is_refused_where_it_is_wrong(
    tmp_path: Path, text: str, said: str
) -> None:
    assert any(said in line for line in refusals(tmp_path, text))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("adapter_name_or_path", "adapters"),  # though it is nearer to adapter_name
        ("model_name_or_path", "base"),
        ("export_size", "shard_size"),
        ("dytpe", "dtype"),
    ],
)
def test_words_of_other_tools_are_known(tmp_path: Path, word: str, meant: str) -> None:
    said = f"2:1: there is no option '{word}'. Did you mean {meant}?"
    assert refusals(tmp_path, f"adapters: [a]\n{word}: b") == [said]


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, content, said in (
        ("none.yaml", None, "cannot be read (No such file or directory)"),
        ("large.yaml", b"#" * (1 << 20) + b"\n", "is larger than any recipe"),
        ("latin.yaml", b"out: \xff", "is no text (invalid start byte)"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_recipe(tmp_path / name)
        assert said in str(caught.value)


def test_words_are_taken_as_yaml_1_2_has_them() -> None:
    said = read_yaml("[no, 012, 1e3, .5, -7, ~, True, 1:30, '5', 2026-01-01, on]").value
    assert said == ["no", 12, 1000.0, 0.5, -7, None, True, "1:30", "5", "2026-01-01", "on"]


def test_paths_start_where_the_recipe_lies(tmp_path: Path) -> None:
    (tmp_path / "org" / "there").mkdir(parents=True)
    found = recipe(
        tmp_path,
        "base: org/there\nadapters:\n- ../lora@0.5\n- {path: /abs/lora, weight: 2}\n- us/model@2\n"
        "- s3://ours/lora\nendpoint_url: http://s3\nanonymous: true\nout: results/merged\n"
        "device_map: map.json\ntokenizer: base\nlayers: 5\nshard_size: 1000000\n",
    )
    assert found.base == f"{tmp_path}/org/there"
    there = (f"{tmp_path}/../lora@0.5", ("/abs/lora", 2.0))
    assert found.adapters == (*there, "hf://us/model@2", "s3://ours/lora")
    assert found.options == {
        "endpoint_url": "http://s3",
        "anonymous": True,
        "out": f"{tmp_path}/results/merged",
        "device_map": f"{tmp_path}/map.json",
        "tokenizer": "base",
        "layers": "5",
        "shard_size": "1000000",
    }


MERGEKIT = """\
models:
  - model: Qwen/Qwen1.5-7B+/data/my-lora
merge_method: passthrough
dtype: bfloat16
"""


def test_mergekits_base_plus_adapter_is_understood(tmp_path: Path) -> None:
    found = recipe(tmp_path, MERGEKIT)
    assert (found.base, found.adapters) == ("hf://Qwen/Qwen1.5-7B", ("/data/my-lora",))
    assert found.options == {"dtype": "bfloat16"}
    assert recipe(tmp_path, MERGEKIT + "tokenizer_source: base").options["tokenizer"] == "base"


def test_all_else_of_mergekit_is_refused_by_name(tmp_path: Path) -> None:
    text = (
        "models:\n  - model: a+b@main\n    parameters: {weight: 1}\nmerge_method: slerp\n"
        "base_model: c\ntokenizer_source: union\ndtype: int9\n"
    )
    lines = [line.partition(". See")[0] for line in refusals(tmp_path, text)]
    assert lines[:5] == [
        "2:12: 'a+b@main': revisions (@) are not understood in mergekit's notation",
        "3:5: mergekit's parameters of a model has no counterpart in raymeld",
        "4:15: mergekit's merge_method 'slerp' merges whole models, which raymeld does not",
        "5:1: mergekit's base_model has no counterpart in raymeld",
        "6:19: mergekit's tokenizer_source 'union': base is understood",
    ]
    assert lines[5].startswith("7:8: dtype: 'int9' is none of its values")
    for model, said in (
        ("- model: a", "'a' is not base+adapter"),
        ("- model: a+b+c", "'a+b+c' is not base+adapter"),
        ("- {model: {lora: x}}", "is written base+adapter here"),
        ("- model: a+b\n- model: c+d", "one is understood, written base+adapter"),
    ):
        assert said in refusals(tmp_path, f"models:\n{model}\nmerge_method: passthrough")[0]
    assert "mergekit's slices has no counterpart" in "".join(refusals(tmp_path, "slices: []"))


def test_every_flag_of_merge_has_its_field_or_a_reason_why_not() -> None:
    flags = set(inspect.signature(merge).parameters)
    assert set(recipe_model().model_fields) - {"base", "adapters"} == flags - NO_FIELDS.keys()
    assert NO_FIELDS.keys() <= flags


def test_the_recipe_that_a_merge_keeps_has_every_option_of_its_plan() -> None:
    """``layers`` and ``cache`` change no byte."""
    from merge_core.asked import Asked
    from merge_core.updates.combined import Combination

    asked = Asked(
        adapter_name="a",
        tokenizer="base",
        dtype="float32",
        shard_bytes=5,
        device_map=Path("/map"),
        keep_tied=True,
        combination=Combination(method="ties", density=0.5, majority_sign="total", seed=3),
        layers="5",
        dequantize=True,
        simulate_nf4=True,
        access=Access(endpoint_url="http://s3", region="here", anonymous=True, cache=True),
    )
    kept = asked.recipe(locate("s3://ours/base"), [])
    options = {option.name for option in options_of(PlanOptions)}
    assert kept.keys() - {"base", "adapters"} == options - {"layers", "cache"}
    assert asked.recipe(locate("/base"), []).keys() == kept.keys() - set(asdict(asked.access))


def test_the_published_schema_is_that_of_the_flags() -> None:
    """Made by: python -m cluster.recipe_model > docs/recipe.schema.json."""
    assert json.loads(SCHEMA.read_text()) == recipe_schema()
    properties = recipe_schema()["properties"]
    assert properties["workers"]["anyOf"][0] == {"minimum": 1, "type": "integer"}
    assert properties["address"]["default"] == "local"
    assert all(described["description"] for described in properties.values())
