"""Whose tokenizer the result gets: the rule, its exceptions, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from handmade import TWO_LANES, random_tensors, write_base, write_json
from models import edit_json
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import SMALL, adapter_at, swift_2, tokenizer_at
from transformers import PreTrainedTokenizerFast

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = write_base(tmp_path / "base", random_tensors(SMALL), SMALL.config)
    (tokenizer_at(path) / "merges.txt").write_text("of the base")
    (path / "LICENSE").write_text("terms")
    return path


def trained(path: Path, *added: str) -> Path:
    return tokenizer_at(adapter_at(path), added)


def refusal(base: Path, *adapters: Path, tokenizer: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(base, adapters, tokenizer=tokenizer)
    return str(caught.value)


def origins(base: Path, *adapters: Path, tokenizer: str | None = None) -> dict[str, Path]:
    plan = make_plan(base, adapters, tokenizer=tokenizer)
    return {side.name: side.folder.local for side in plan.side_files if side.name[0].islower()}


OWN = ("chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer_config.json")
BROUGHT = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def test_an_adapters_tokenizer_wins_whole_and_is_verified(base: Path, tmp_path: Path) -> None:
    adapter, out = trained(tmp_path / "adapter", "<a>", "<b>"), tmp_path / "out"
    plan = make_plan(base, [adapter])
    said = f"the tokenizer is that of {adapter}, in place of the base's, with 2 tokens more"
    assert plan.notes == (f"{said}: '<a>', '<b>'",)

    result = merge(plan, out, device="cpu", choice=TWO_LANES, level="numeric")
    assert result.verified is not None
    assert result.verified.ok
    for name in BROUGHT:
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert not (out / "merges.txt").exists()  # files of two tokenizers do not fit one another
    assert (out / "LICENSE").read_text() == "terms"

    (adapter / "chat_template.jinja").write_text("another")
    (finding,) = verify(out, "numeric").findings
    assert str(finding) == f"base: chat_template.jinja: it differs from that of {adapter}"


def test_tokens_that_an_adapters_tokenizer_lacks_are_told(base: Path, tmp_path: Path) -> None:
    adapter = tokenizer_at(adapter_at(tmp_path / "adapter"), first=68)
    _, note = make_plan(base, [adapter]).notes
    assert note == f"{adapter}: its tokenizer lacks 2 tokens of the base's: 't68', 't69'"


def test_the_bases_own_tokenizer_in_an_adapter_changes_nothing(base: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter")
    assert origins(base, adapter) == dict.fromkeys(OWN, base)
    assert make_plan(base, [adapter]).notes == ()


def test_a_chat_template_alone_replaces_that_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("mine")
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tool.jinja").write_text("tools")
    assert origins(base, adapter) == {
        **dict.fromkeys(OWN, base),
        "additional_chat_templates/tool.jinja": adapter,
        "chat_template.jinja": adapter,
    }
    (note,) = make_plan(base, [adapter]).notes
    assert note == f"the chat template is that of {adapter}, in place of the base's"


def test_different_tokenizers_are_refused_until_one_is_chosen(base: Path, tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one", "<a>"), trained(tmp_path / "two", "<b>")
    same = trained(tmp_path / "same", "<a>")
    plain = adapter_at(tmp_path / "plain")
    text = refusal(base, one, two)
    assert f"adapters bring different tokenizers or chat templates ({one}, {two})" in text
    assert f"Choose with --tokenizer base or --tokenizer {one}" in text
    assert "different tokenizers" in refusal(base, one, trained(tmp_path / "own"))
    assert origins(base, plain, one, same) == dict.fromkeys(BROUGHT, one)
    assert origins(base, one, two, tokenizer="base") == dict.fromkeys(OWN, base)
    assert origins(base, one, two, tokenizer=str(two)) == dict.fromkeys(BROUGHT, two)
    assert "is none of the adapters. Give base, or" in refusal(base, one, tokenizer="elsewhere")
    assert "brings no tokenizer" in refusal(base, one, plain, tokenizer=str(plain))


def test_a_tokenizer_must_fit_the_embeddings(base: Path, tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "adapter")
    assert SMALL.vocab == 80
    tokenizer_at(adapter, ("<a>",), first=79)
    assert origins(base, adapter) == dict.fromkeys(BROUGHT, adapter)
    tokenizer_at(adapter, ("<a>", "<b>"), first=79)
    assert "token '<b>' has id 80, and the embeddings have 80 rows" in refusal(base, adapter)
    assert origins(base, adapter, tokenizer="base") == dict.fromkeys(OWN, base)
    tokenizer_at(adapter)
    decoder = {"80": {"content": "<late>", "special": True}}
    edit_json(adapter / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert "token '<late>' has id 80" in refusal(base, adapter)


def test_a_slow_tokenizer_is_read_as_well(base: Path, tmp_path: Path) -> None:
    adapter = adapter_at(tmp_path / "adapter")
    write_json(adapter / "vocab.json", {f"t{n}": n for n in range(70)})
    (adapter / "tokenizer_config.json").write_text("{}")
    text = refusal(base, adapter)
    assert "brings tokenizer_config.json, vocab.json, and no vocabulary: its tokenizer is" in text
    (adapter / "merges.txt").write_text("")
    write_json(adapter / "added_tokens.json", {"<x>": 81})
    assert "token '<x>' has id 81" in refusal(base, adapter)
    write_json(adapter / "added_tokens.json", {"<x>": 75})
    notes = make_plan(base, [adapter]).notes
    assert notes[0].endswith("in place of the base's, with 1 token more: '<x>'")
    assert notes[1].endswith("its tokenizer has no chat template, and the base's one goes with it")
    write_json(adapter / "added_tokens.json", {"<x>": True})
    assert "gives token '<x>' an id that is none" in refusal(base, adapter)


def test_a_tokenizer_of_another_model_must_be_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter")
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"t3": 4, "t4": 3}
    write_json(adapter / "tokenizer.json", content)
    assert "gives 2 tokens other ids than the base does ('t3', 't4')" in refusal(base, adapter)
    notes = make_plan(base, [adapter], tokenizer=str(adapter)).notes
    assert notes[-1] == "it gives 2 tokens other ids than the base's tokenizer"


def test_a_tokenizer_beside_the_folder_of_the_adapter_counts(base: Path, tmp_path: Path) -> None:
    output = tokenizer_at(swift_2(tmp_path / "output"), ("<a>",))
    assert origins(base, output) == dict.fromkeys(BROUGHT, output)
    assert origins(base, output / "default") == dict.fromkeys(OWN, base)
    tokenizer_at(output / "default", ("<b>",))
    assert origins(base, output) == dict.fromkeys(BROUGHT, output / "default")


def test_a_base_whose_tokenizer_cannot_be_read_is_said(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("no json")
    adapter = trained(tmp_path / "adapter", "<a>")
    notes = make_plan(base, [adapter]).notes
    assert notes[0] == f"{base}: its tokenizer cannot be read, so the two were not compared"
    shutil.copy(base / "tokenizer.json", adapter / "tokenizer.json")
    (adapter / "chat_template.jinja").write_text("mine")
    assert "tokenizer.json: is no JSON" in refusal(base, adapter)


def real_tokenizer(path: Path, *added: str) -> PreTrainedTokenizerFast:
    """One of bytes, as transformers saves it, trained on nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    model = models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.chat_template = f"{{{{ messages[0].content }}}}{''.join(added)}"
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(path)
    return tokenizer


def test_transformers_loads_the_tokenizer_that_was_trained_with(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", random_tensors(SMALL), SMALL.config)
    adapter, out = adapter_at(tmp_path / "adapter"), tmp_path / "out"
    real_tokenizer(base)
    trained_with = real_tokenizer(adapter, "<think>", "</think>")
    plan = make_plan(base, [adapter])
    assert plan.notes[0].endswith("with 2 tokens more: '<think>', '</think>'")
    merge(plan, out, device="cpu", choice=TWO_LANES)
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert loaded.get_vocab() == trained_with.get_vocab()
    assert loaded.chat_template == trained_with.chat_template
    text = "<think>AB</think>"
    assert loaded(text).input_ids == trained_with(text).input_ids
