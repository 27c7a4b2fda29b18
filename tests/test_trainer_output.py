"""What trainers leave behind: one adapter is found, or refused with a list; none is guessed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import TWO_LANES, random_tensors, write_base
from models import edit_json
from safetensors.torch import load_file
from trainers import (
    SMALL,
    adapter_at,
    axolotl,
    checkpoint_at,
    llama_factory,
    llama_factory_pissa,
    swift,
    swift_2,
    swift_pissa,
    trainer,
    unsloth,
)

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.trainer_output import split_words


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "Qwen1.5-7B"
    return write_base(path, random_tensors(SMALL), SMALL.config)


def refusal(base: Path | None, *adapters: Path, name: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(base, adapters, adapter_name=name)
    return str(caught.value)


def paths(plan: MergePlan) -> list[Path]:
    return [adapter.path.local for adapter in plan.adapters]


def test_a_trainers_checkpoint_is_an_adapter(base: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path / "checkpoint-7")
    plan = make_plan(base, [checkpoint])
    assert paths(plan) == [checkpoint]
    assert plan.notes == ()


@pytest.mark.parametrize("make", [trainer, llama_factory])
def test_the_final_adapter_is_taken_and_its_checkpoints_are_said(
    make: Callable[[Path], Path], base: Path, tmp_path: Path
) -> None:
    output = make(tmp_path / "output")
    plan = make_plan(base, [output])
    assert paths(plan) == [output]
    tokenizer, note = plan.notes
    assert tokenizer.startswith(f"the tokenizer is that of {output}")
    assert f"{output}: its own adapter is merged; checkpoint-5, checkpoint-10 in it not" in note
    chosen = make_plan(base, [output], adapter_name="checkpoint-10")
    assert paths(chosen) == [output / "checkpoint-10"]
    assert paths(make_plan(base, [output], adapter_name="default")) == [output]
    text = refusal(base, output, name="checkpoint-11")
    assert "holds no adapter 'checkpoint-11', but default, checkpoint-5, checkpoint-10" in text


def test_a_checkpoint_that_is_chosen_gives_its_own_values(base: Path, tmp_path: Path) -> None:
    output = trainer(tmp_path / "output")
    for name, path in (("chosen", output), ("given", output / "checkpoint-10")):
        choice = "checkpoint-10" if name == "chosen" else None
        plan = make_plan(base, [path], adapter_name=choice)
        merge(plan, tmp_path / name, device="cpu", choice=TWO_LANES, level="numeric")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("chosen", "given"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_axolotls_output_is_an_adapter_though_it_has_a_config_of_the_model(
    base: Path, tmp_path: Path
) -> None:
    output = axolotl(tmp_path / "outputs", ended=True)
    assert split_words([str(output)]) == (None, [str(output)])
    assert split_words([str(base), str(output)]) == (str(base), [str(output)])
    assert paths(make_plan(base, [output])) == [output]


def test_axolotls_training_that_did_not_end_is_not_taken_for_an_adapter(
    base: Path, tmp_path: Path
) -> None:
    output = axolotl(tmp_path / "outputs", ended=False)
    text = refusal(base, output)
    assert "has an adapter_config.json without weights: its training did not end" in text
    assert "checkpoint-8, checkpoint-16. Choose with --adapter-name, such as checkpoint-16" in text
    shutil.rmtree(output / "checkpoint-8")  # not even the only one is guessed
    assert "without weights" in refusal(base, output)
    plan = make_plan(base, [output], adapter_name="checkpoint-16")
    assert paths(plan) == [output / "checkpoint-16"]


def test_of_swifts_checkpoints_none_is_guessed(base: Path, tmp_path: Path) -> None:
    run = swift(tmp_path / "output")
    assert "holds 2 adapters: checkpoint-20, checkpoint-100" in refusal(base, run)
    plan = make_plan(base, [run], adapter_name="checkpoint-100")
    assert paths(plan) == [run / "checkpoint-100"]
    text = refusal(base, tmp_path / "output")
    assert f"there is one in {run.name}/checkpoint-100, {run.name}/checkpoint-20" in text


@pytest.mark.parametrize("name", ["pissa_init", "pissa_backup"])
def test_what_llama_factory_has_not_converted_is_not_merged(
    base: Path, tmp_path: Path, name: str
) -> None:
    output = llama_factory_pissa(tmp_path / "output")
    assert "init_lora_weights='pissa_niter_16'" in refusal(base, output)
    assert "in pissa_converted and converted/default" in refusal(base, output)
    said = f"{output / name}: trainers call {name} an adapter of PiSSA or its like that is not"
    assert said in refusal(base, output, name=name)
    assert said in refusal(base, output / name)
    assert "checkpoint-10, pissa_converted" in refusal(base, output, name="nothing")
    assert name not in refusal(base, output, name="nothing")
    plan = make_plan(base, [output], adapter_name="pissa_converted")
    assert paths(plan) == [output / "pissa_converted"]


def test_what_swift_has_not_converted_is_not_merged(base: Path, tmp_path: Path) -> None:
    run = swift_pissa(tmp_path / "output")
    assert "holds 2 adapters: checkpoint-20, checkpoint-100. Choose" in refusal(base, run)
    assert "initial_model an adapter of PiSSA or its like" in refusal(
        base, run, name="initial_model"
    )
    assert "init_lora_weights='pissa'" in refusal(base, run, name="checkpoint-100")
    converted = run / "checkpoint-100" / "converted"
    assert paths(make_plan(base, [converted])) == [converted / "default"]


def test_the_one_adapter_in_a_directory_is_taken_and_said(base: Path, tmp_path: Path) -> None:
    checkpoint = swift_2(tmp_path / "checkpoint-3")
    plan = make_plan(base, [f"{checkpoint}@0.5"])
    assert paths(plan) == [checkpoint / "default"]
    assert plan.adapters[0].weight == 0.5
    assert plan.notes == (f"{checkpoint}: the one adapter in it is default",)
    assert paths(make_plan(base, [checkpoint], adapter_name="default")) == paths(plan)


def test_adapters_that_peft_saves_under_their_names_are_listed(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name in ("style", "facts"):
        adapter_at(output / name)
    assert "holds 2 adapters: facts, style" in refusal(base, output)
    assert paths(make_plan(base, [output], adapter_name="style")) == [output / "style"]
    assert "holds no adapter '../x', but facts" in refusal(base, output, name="../x")


def test_unsloths_packed_copy_of_the_base_is_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "Qwen1.5-7B-Chat", random_tensors(SMALL), SMALL.config)
    adapter = unsloth(tmp_path / "lora")
    (note,) = make_plan(base, [adapter]).notes
    assert note == f"the tokenizer is that of {adapter}, in place of the base's"


def test_weights_that_were_trained_beside_the_adapter_are_never_dropped(
    base: Path, tmp_path: Path
) -> None:
    adapter = adapter_at(tmp_path / "adapter")
    (adapter / "value_head.safetensors").write_bytes(b"")
    (note,) = make_plan(base, [adapter]).notes
    assert "value_head.safetensors is left out: the result is the language model alone" in note
    (adapter / "non_lora_trainables.bin").write_bytes(b"")
    text = refusal(base, adapter)
    assert "non_lora_trainables.bin holds weights that were trained beside the adapter" in text


def test_without_base_the_adapters_own_is_merged_into(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    one = adapter_at(tmp_path / "one", base_model_name_or_path=base.name)  # as PEFT means it
    two = adapter_at(tmp_path / "two", base_model_name_or_path=f"{base}/")
    plan = make_plan(None, [one, two])
    assert plan.base.local == base
    assert plan.notes == ("BASE is the one that the adapters name",)
    three = adapter_at(tmp_path / "three", base_model_name_or_path="Qwen/Qwen1.5-4B")
    text = refusal(None, one, three)
    assert f"2 different bases ({one}: {base}, {three}: hf://Qwen/Qwen1.5-4B)" in text
    edit_json(three / "adapter_config.json", base_model_name_or_path="/gone/Qwen1.5-4B")
    assert "Qwen1.5-4B', which is not on this disk, and no name of the" in refusal(None, three)
    edit_json(three / "adapter_config.json", base_model_name_or_path=None)
    assert "names no base (base_model_name_or_path)" in refusal(None, three, one)


@pytest.mark.parametrize(
    ("named", "same"),
    [
        ("Qwen/Qwen1.5-7B", True),
        ("/elsewhere/qwen1.5-7b/", True),
        ("/x/models--Qwen--Qwen1.5-7B/snapshots/0123", True),
        ("/root/.cache/modelscope/hub/qwen/Qwen1___5-7B", True),
        ("unsloth/qwen1.5-7b-unsloth-bnb-4bit", True),
        ("Qwen/Qwen1.5-7B-Chat", False),
        ("Qwen/Qwen1.5-14B", False),
    ],
)
def test_another_base_than_the_adapters_is_warned_of(
    base: Path, tmp_path: Path, named: str, *, same: bool
) -> None:
    adapter = adapter_at(tmp_path / "adapter", base_model_name_or_path=named)
    wanted = f"{adapter} was trained on {named!r}, by its name another base than Qwen1.5-7B"
    notes = make_plan(base, [adapter]).notes
    assert [note.partition(": ")[0] for note in notes] == [wanted] * (not same)


def test_a_base_may_say_how_it_is_called_elsewhere(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "renamed")
    adapter = adapter_at(tmp_path / "adapter", base_model_name_or_path="Qwen/Qwen1.5-7B")
    assert len(make_plan(copy, [adapter]).notes) == 1
    edit_json(copy / "config.json", _name_or_path="Qwen/Qwen1.5-7B")
    assert make_plan(copy, [adapter]).notes == ()


def test_the_first_word_is_the_base_unless_it_is_an_adapter(base: Path, tmp_path: Path) -> None:
    run, adapter = swift(tmp_path / "output"), adapter_at(tmp_path / "adapter")
    for words, wanted in (
        ([f"{adapter}@0.5"], (None, [f"{adapter}@0.5"])),
        (["nowhere"], (None, ["nowhere"])),
        ([str(base)], (str(base), [])),
        ([str(base), str(adapter)], (str(base), [str(adapter)])),
        (["nowhere", str(adapter)], ("nowhere", [str(adapter)])),
        ([str(run), f"{adapter}@2"], (None, [str(run), f"{adapter}@2"])),
    ):
        assert split_words(words) == wanted
    assert "is a checkpoint, not an adapter" in refusal(None, adapter, base)
