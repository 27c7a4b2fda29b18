"""Whose tokenizer the result gets, with its chat template.

An adapter that brings a tokenizer was trained with it, so it wins: all of the base's tokenizer
files give way to it, as files of two tokenizers do not fit one another. A chat template alone
replaces the base's template. Adapters that bring different ones are refused until one is chosen.
The tokenizer of an adapter may lie in the directory that was named, with the adapter in a folder
below: trainers save it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_core.adapter import Adapter, parse_adapter
from merge_core.errors import InputError, Problem, counted, refuse, shortened, some_of
from merge_core.json_text import parse_object
from merge_core.plan import SideFile
from merge_core.side_files import TEMPLATES, templates_in
from merge_core.storage import FileIdentity, reported
from merge_core.vocabulary import (
    ADDED,
    MERGES,
    SETTINGS,
    VOCABULARY,
    WHOLE,
    Vocabulary,
    read_vocabulary,
)

BASE = "base"
"""What ``--tokenizer`` calls the base's own."""

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_COMPLETE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken")
"""Files that are a vocabulary by themselves, as ``tokenizer.json`` is."""

_FILES = (
    *(WHOLE, SETTINGS, "special_tokens_map.json", ADDED, VOCABULARY, MERGES, "vocab.txt"),
    *_COMPLETE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """The tokenizer of the result."""

    side_files: tuple[SideFile, ...]
    """All files beside the weights, those of the tokenizer among them."""
    adapter: int | None
    """Which one's it is; None: the base's."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Brought:
    """The tokenizer, or the chat template alone, that an adapter brings."""

    adapter: int
    folder: Path
    names: tuple[str, ...]
    digests: tuple[tuple[str, str], ...]

    @property
    def templates_only(self) -> bool:
        return all(map(_is_template, self.names))


def choose_tokenizer(
    base: Path,
    side_files: Sequence[SideFile],
    adapters: Sequence[Adapter],
    asked: str | None,
    rows: int | None,
) -> TokenizerChoice:
    """Decide which tokenizer the result gets.

    Args:
        base: its directory.
        side_files: those of the base.
        asked: ``base``, or the directory of an adapter as it was given; None: by the rule.
        rows: of the result's embeddings, one a token; None: not known.

    Raises:
        InputError: adapters bring different ones, or the one that wins is not complete or does not
            fit the embeddings or the base's ids.
    """
    own = TokenizerChoice(side_files=tuple(side_files), adapter=None)
    if asked == BASE:
        return own
    brought = [one for n, adapter in enumerate(adapters) if (one := _brought(n, adapter))]
    named = None if asked is None else _by_name(asked, brought, adapters)
    one = named or _by_rule(base, brought, adapters)
    if one is None or _is_the_bases(base, one):
        return own
    if not one.templates_only:
        _check_complete(one)
    notes = tuple(_notes(base, one, rows, chosen=named is not None))
    return TokenizerChoice(
        side_files=tuple(_replaced(side_files, one)), adapter=one.adapter, notes=notes
    )


def _brought(number: int, adapter: Adapter) -> _Brought | None:
    for folder in dict.fromkeys((adapter.path, adapter.given)):
        names = [name for name in (*_FILES, *_TEMPLATE_FILES) if (folder / name).is_file()]
        names += templates_in(folder)
        if names:
            digests = tuple((name, _digest(folder / name)) for name in sorted(names))
            return _Brought(adapter=number, folder=folder, names=tuple(names), digests=digests)
    return None


def _by_rule(
    base: Path, brought: Sequence[_Brought], adapters: Sequence[Adapter]
) -> _Brought | None:
    if len({_content(base, one) for one in brought}) > 1:
        said = ", ".join(str(one.folder) for one in brought)
        what = f"adapters bring different tokenizers or chat templates ({said})"
        remedy = f"Choose with --tokenizer base or --tokenizer {adapters[brought[0].adapter].given}"
        raise refuse(what, "ADAPTER", remedy)
    return brought[0] if brought else None


def _content(base: Path, one: _Brought) -> object:
    """Equal for equal tokenizers; the base's own may be there in part."""
    return "base" if _is_the_bases(base, one) else one.digests


def _by_name(asked: str, brought: Sequence[_Brought], adapters: Sequence[Adapter]) -> _Brought:
    wanted = parse_adapter(asked)[0].absolute()
    for number, adapter in enumerate(adapters):
        if wanted in (adapter.given, adapter.path):
            found = [one for one in brought if one.adapter == number]
            if found:
                return found[0]
            what = "brings no tokenizer and no chat template"
            raise refuse(what, f"--tokenizer {asked}", "Give --tokenizer base, or leave it out")
    remedy = f"Give base, or one of {', '.join(str(adapter.given) for adapter in adapters)}"
    raise refuse("is none of the adapters", f"--tokenizer {asked}", remedy)


def _is_the_bases(base: Path, one: _Brought) -> bool:
    """Whether all that it consists of is there in the base, byte for byte."""
    return all(
        (base / name).is_file() and _digest(base / name) == digest for name, digest in one.digests
    )


def _check_complete(one: _Brought) -> None:
    has = set(one.names)
    if WHOLE not in has and not {VOCABULARY, MERGES} <= has and not has & {*_COMPLETE, "vocab.txt"}:
        what = f"brings {some_of(one.names)}, and no vocabulary: its tokenizer is not complete"
        remedy = "Save the tokenizer again, or give --tokenizer base"
        raise refuse(what, str(one.folder), remedy)


def _notes(base: Path, one: _Brought, rows: int | None, *, chosen: bool) -> Iterator[str]:
    if one.templates_only:
        yield f"the chat template is that of {one.folder}, in place of the base's"
        return
    mine = read_vocabulary(one.folder)
    theirs = Vocabulary(ids={})
    try:
        theirs = read_vocabulary(base)
    except InputError:
        yield f"{base}: its tokenizer cannot be read, so the two were not compared"
    _check_fit(one, mine, rows)
    moved = mine.moved(theirs)
    if moved and not chosen:
        what = f"gives {counted(len(moved), 'token')} other ids than the base does"
        shown = some_of([shortened(token) for token in moved])
        remedy = f"Give --tokenizer base; or --tokenizer {one.folder} if this is what you want"
        raise refuse(f"{what} ({shown}): it is of another model", str(one.folder), remedy)
    new = mine.beyond(theirs) if theirs.ids else []
    more = f", with {counted(len(new), 'token')} more: {_listed(new)}" if new else ""
    yield f"the tokenizer is that of {one.folder}, in place of the base's{more}"
    if moved:
        yield f"it gives {counted(len(moved), 'token')} other ids than the base's tokenizer"
    if not mine.ids:
        yield f"{one.folder}: nothing tells whether its tokenizer fits the embeddings"
    if _has_template(base) and not _has_template(one.folder):
        yield f"{one.folder}: its tokenizer has no chat template, and the base's one goes with it"


def _check_fit(one: _Brought, vocabulary: Vocabulary, rows: int | None) -> None:
    token, last = vocabulary.last
    if rows is not None and last >= rows:
        what = f"token {shortened(token)} has id {last}, and the embeddings have {rows} rows"
        remedy = "Save the embeddings with the adapter (modules_to_save), or give --tokenizer base"
        raise InputError([Problem(what, str(one.folder), remedy)])


def _replaced(side_files: Sequence[SideFile], one: _Brought) -> list[SideFile]:
    """The base's files, with those that are brought in the place of the tokenizer's."""
    gone = _is_template if one.templates_only else _is_tokenizers
    kept = [file for file in side_files if not gone(file.name)]
    new = [
        SideFile(name=name, folder=one.folder, file=FileIdentity.of(one.folder, name))
        for name in one.names
    ]
    return sorted([*kept, *new], key=lambda file: file.name)


def _is_template(name: str) -> bool:
    return name in _TEMPLATE_FILES or name.startswith(f"{TEMPLATES}/")


def _is_tokenizers(name: str) -> bool:
    return name in _FILES or _is_template(name)


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATE_FILES) or templates_in(folder):
        return True
    path = folder / SETTINGS
    if not path.is_file():
        return False
    with reported(path):
        data = path.read_bytes()
    try:
        return bool(parse_object(data, str(path), "").get("chat_template"))
    except InputError:
        return False


def _listed(tokens: Sequence[str]) -> str:
    return some_of([shortened(token) for token in tokens])


def _digest(path: Path) -> str:
    with reported(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
