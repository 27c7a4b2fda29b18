"""Recipes at work: flags come before them, and the one that is kept makes the same bytes again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from handmade import random_tensors, write_base
from models import edit_json
from trainers import SMALL, adapter_at, tokenizer_at, trainer
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.merge_words import _words_of, unfolded
from cluster.recipe import read_recipe
from merge_core.adapter import parse_adapter
from merge_core.trainer_output import split_words

ADDRESS = ("--address", "inline", "--quiet", "--json")


def raymeld(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> Result:
    result = raymeld(*words)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "base"
    return tokenizer_at(write_base(path, random_tensors(SMALL), SMALL.config))


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    output = trainer(tmp_path / "output", base_model_name_or_path=str(base))
    tokenizer_at(output, ("<a>",))
    return output, adapter_at(tmp_path / "plain", seed=3, base_model_name_or_path=str(base))


def digests(out: Path) -> dict[str, str]:
    """Of all files of the checkpoint."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in out.iterdir()
        if file.is_file()
    }


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--adapter-name", "default", "--tokenizer", "base", "--dtype", "float32"],
        ["--combine", "dare_ties", "--density", "0.5", "--seed", "7"],
        ["--combine", "cat", "--shard-size", "15kB", "--simulate-nf4"],
    ],
)
def test_the_recipe_that_is_kept_makes_the_same_bytes_again(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    one, two = adapters
    words = [one] if "--adapter-name" in options else [base, f"{one}@0.7", f"{two}@-0.3"]
    done("merge", *words, "--out", tmp_path / "out", *options, *ADDRESS)
    kept = tmp_path / "out" / ".raymeld" / "recipe.yaml"
    done("merge", kept, "--out", tmp_path / "again", *ADDRESS)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")
    again = tmp_path / "again" / ".raymeld" / "recipe.yaml"
    assert kept.read_bytes() == again.read_bytes()
    said = json.loads(done("merge", kept, "--out", tmp_path / "again", *ADDRESS).stdout)
    assert said["already_there"] is True


def test_flags_come_before_the_recipe_and_it_before_defaults(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"adapters: [{adapters[0].name}]\nout: merged\ndtype: float32\nshard_size: 15kB\n"
        "address: inline\nverify: structure\nkeep_tied: true\n"
    )
    monkeypatch.chdir(base)  # the recipe's paths start where it lies
    done("merge", tmp_path / "recipe.yaml", "--dtype", "float16", "--quiet")
    plan = json.loads((tmp_path / "merged" / ".raymeld" / "plan.json").read_bytes())
    assert {t["target"]["dtype"] for shard in plan["shards"] for t in shard["tasks"]} == {"F16"}
    assert len(plan["shards"]) > 1
    assert plan["keep_tied"] is True
    verified = json.loads((tmp_path / "merged" / ".raymeld" / "verified.json").read_bytes())
    assert verified["level"] == "structure"
    told = json.loads(done("plan", tmp_path / "recipe.yaml", "--json").stdout)
    assert told["base"] == str(base)


def test_a_recipe_without_out_needs_the_flag_and_has_all_adapters(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {base}\nadapters: [{adapters[1]}]\n")
    assert "Missing option '--out'" in raymeld("merge", path).stderr
    failed = raymeld("merge", path, adapters[0], "--out", tmp_path / "out")
    assert failed.exit_code == 2
    assert "a recipe names base and adapters itself" in failed.stderr
    failed = raymeld("merge", "s3://ours/recipe.yaml", "--out", tmp_path / "out")
    assert failed.exit_code == 2
    assert "s3://ours/recipe.yaml: a recipe is read from a disk. Fetch it" in failed.stderr


def test_the_recipe_command_writes_what_reads_the_same(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    words = [base, f"{adapters[0]}@0.5", adapters[1], "--out", tmp_path / "merged"]
    options = ["--dtype", "float32", "--keep-tied", "--workers", "3", "--combine", "cat"]
    written = done("recipe", *words, *options).stdout
    (tmp_path / "recipe.yaml").write_text(written)
    found = read_recipe(tmp_path / "recipe.yaml")
    assert found.base == str(base)
    assert found.adapters == ((str(adapters[0]), 0.5), (str(adapters[1]), 1.0))
    assert found.options == {
        "out": str(tmp_path / "merged"),
        "dtype": "float32",
        "keep_tied": True,
        "workers": 3,
        "combine": "cat",
    }
    assert "# Most bytes of an output file. [2GB]\n# shard_size:\n" in written  # as --help has it
    assert "# Wait so long for workers. [1800]\n# start_timeout:\n" in written
    again = done("recipe", tmp_path / "recipe.yaml").stdout
    assert again == written


def test_texts_that_look_like_something_else_stay_texts(base: Path, tmp_path: Path) -> None:
    odd = adapter_at(tmp_path / 'ünï: #1 "quoted" 😀 \x7f')
    done("merge", base, odd, "--out", tmp_path / "out", *ADDRESS)
    found = read_recipe(tmp_path / "out" / ".raymeld" / "recipe.yaml")
    assert found.adapters == ((str(odd), 1.0),)


def test_paths_can_be_read_in_any_script(base: Path, tmp_path: Path) -> None:
    chinese = adapter_at(tmp_path / "我的 适配器")
    line = f'- path: "{chinese}"'
    done("merge", base, chinese, "--out", tmp_path / "合并", *ADDRESS)
    kept = tmp_path / "合并" / ".raymeld" / "recipe.yaml"
    assert line in kept.read_text(encoding="utf-8").splitlines()
    assert read_recipe(kept).adapters == ((str(chinese), 1.0),)
    assert line in done("recipe", base, chinese, "--out", tmp_path / "x").stdout.splitlines()

    runner = CliRunner(charset="gbk")  # which nobody would read back as UTF-8
    printed = runner.invoke(app, ["recipe", str(base), str(chinese), "--out", "x"]).stdout_bytes
    (tmp_path / "recipe.yaml").write_bytes(printed)
    assert printed.isascii()
    assert read_recipe(tmp_path / "recipe.yaml").adapters == ((str(chinese), 1.0),)


def test_a_submitted_recipe_is_sent_as_words(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {base}\nadapters: [{adapters[0]}@0.5]\nout: out\nkeep_tied: true\nworkers: 2\n"
        "address: local\n"
    )
    parameters = _parsed("merge", path, "--dtype", "float32", "--overwrite")
    found = read_recipe(path)
    parameters["words"] = [str(found.base), *map(str, found.adapters)]
    assert unfolded(parameters) == [
        *("merge", str(base), f"{adapters[0]}@0.5", "--dtype", "float32", "--keep-tied"),
        *("--out", f"{tmp_path}/out", "--workers", "2", "--overwrite"),
    ]
    assert _parsed(*unfolded(parameters)) == {**parameters, "address": "local"}
    path.write_text("adapters: [a]\nout: out\nworkrs: 2\n")
    failed = raymeld("submit", "--", "merge", path)
    assert failed.exit_code == 2
    assert f"{path}:3:1: there is no option 'workrs'. Did you mean workers?" in failed.stderr


def test_a_revision_is_not_sent_as_a_weight() -> None:
    entry = ("hf://us/lora@2", 1.0)
    base, word = _words_of("hf://us/base", [entry])
    assert (base, word) == ("hf://us/base", "hf://us/lora@2@1.0")
    assert parse_adapter(word) == parse_adapter(entry)


def _parsed(*words: object) -> dict[str, object]:
    """The parameters of a merge, as its command takes its words apart."""
    import typer

    command = typer.main.get_command(app)
    merge = command.commands["merge"]  # type: ignore[attr-defined]
    return dict(merge.make_context("merge", [str(word) for word in words[1:]]).params)


def test_without_base_the_command_takes_the_adapters_own(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    said = json.loads(done("merge", adapters[1], "--out", tmp_path / "out", *ADDRESS).stdout)
    assert said["notes"] == ["BASE is the one that the adapters name"]
    edit_json(adapters[1] / "adapter_config.json", base_model_name_or_path="/gone/Qwen1.5-7B")
    failed = raymeld("merge", adapters[1], "--out", tmp_path / "other", *ADDRESS)
    assert failed.exit_code == 2
    assert "its base is '/gone/Qwen1.5-7B', which is not on this disk" in failed.stderr
    assert split_words([str(adapters[1])]) == (None, [str(adapters[1])])
