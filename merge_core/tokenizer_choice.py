"""Whose tokenizer the result gets, with its chat template.

An adapter that brings a tokenizer was trained with it, so it wins: all of the base's tokenizer
files give way to it, as files of two tokenizers do not fit one another. A chat template alone
replaces the base's template. Adapters that bring different ones are refused until one is chosen.
The tokenizer of an adapter may lie in the folder that was named, with the adapter in one below:
trainers save it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_core.adapter import Adapter, parse_adapter
from merge_core.checkpoint import Checkpoint
from merge_core.errors import InputError, Problem, counted, refuse, shortened, some_of
from merge_core.folders import SmallFiles, pinned
from merge_core.json_text import parse_object
from merge_core.plan import SideFile
from merge_core.side_files import TEMPLATES, templates_in
from merge_core.stores.location import DEFAULT_ACCESS, Access
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
    files: SmallFiles
    """Of the folder that it lies in."""
    names: tuple[str, ...]

    @property
    def folder(self) -> str:
        return str(self.files.folder)

    @property
    def templates_only(self) -> bool:
        return all(map(_is_template, self.names))

    @property
    def content(self) -> tuple[tuple[str, str], ...]:
        """Equal for equal ones."""
        digests = {name: hashlib.sha256(self.files.read(name)) for name in self.names}
        return tuple(sorted((name, digest.hexdigest()) for name, digest in digests.items()))


def choose_tokenizer(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    rows: int | None,
    asked: str | None = None,
    access: Access = DEFAULT_ACCESS,
) -> TokenizerChoice:
    """Decide which tokenizer the result gets.

    Args:
        rows: of the result's embeddings, one a token; None: not known.
        asked: ``base``, or an adapter as it was given; None: by the rule.
        access: how that is reached, if it lies in a store.

    Raises:
        InputError: adapters bring different ones, or the one that wins is not complete or does not
            fit the embeddings or the base's ids.
        StorageError: a store fails.
    """
    own = TokenizerChoice(side_files=checkpoint.side_files, adapter=None)
    if asked == BASE:
        return own
    brought = [one for n, adapter in enumerate(adapters) if (one := _brought(n, adapter))]
    named = None if asked is None else _by_name(asked, access, brought, adapters)
    if not brought:
        return own
    base = SmallFiles(checkpoint.path)
    one = named or _by_rule(base, brought, adapters)
    if _is_the_bases(base, one):
        return own
    if not one.templates_only:
        _check_complete(one)
    notes = tuple(_notes(base, one, rows, chosen=named is not None))
    return TokenizerChoice(
        side_files=tuple(_replaced(checkpoint.side_files, one)), adapter=one.adapter, notes=notes
    )


def _brought(number: int, adapter: Adapter) -> _Brought | None:
    for folder in dict.fromkeys((adapter.path, adapter.given)):
        files = SmallFiles(folder)
        names = [name for name in (*_FILES, *_TEMPLATE_FILES) if name in files.sizes]
        names += templates_in(files.sizes)
        if names:
            return _Brought(adapter=number, files=files, names=tuple(names))
    return None


def _by_rule(
    base: SmallFiles, brought: Sequence[_Brought], adapters: Sequence[Adapter]
) -> _Brought:
    # The base's own may be there in part.
    if len(brought) > 1 and len({_is_the_bases(base, b) or b.content for b in brought}) > 1:
        said = ", ".join(one.folder for one in brought)
        what = f"adapters bring different tokenizers or chat templates ({said})"
        remedy = f"Choose with --tokenizer base or --tokenizer {adapters[brought[0].adapter].given}"
        raise refuse(what, "ADAPTER", remedy)
    return brought[0]


def _by_name(
    asked: str, access: Access, brought: Sequence[_Brought], adapters: Sequence[Adapter]
) -> _Brought:
    wanted = pinned(parse_adapter(asked, access)[0])
    for number, adapter in enumerate(adapters):
        if wanted in (adapter.given, adapter.path):
            found = [one for one in brought if one.adapter == number]
            if found:
                return found[0]
            what = "brings no tokenizer and no chat template"
            raise refuse(what, f"--tokenizer {asked}", "Give --tokenizer base, or leave it out")
    remedy = f"Give base, or one of {', '.join(str(adapter.given) for adapter in adapters)}"
    raise refuse("is none of the adapters", f"--tokenizer {asked}", remedy)


def _is_the_bases(base: SmallFiles, one: _Brought) -> bool:
    """Whether all that it consists of is there in the base, byte for byte."""
    return all(base.holds(name, one.files) for name in one.names)


def _check_complete(one: _Brought) -> None:
    has = set(one.names)
    if WHOLE not in has and not {VOCABULARY, MERGES} <= has and not has & {*_COMPLETE, "vocab.txt"}:
        what = f"brings {some_of(one.names)}, and no vocabulary: its tokenizer is not complete"
        remedy = "Save the tokenizer again, or give --tokenizer base"
        raise refuse(what, one.folder, remedy)


def _notes(base: SmallFiles, one: _Brought, rows: int | None, *, chosen: bool) -> Iterator[str]:
    if one.templates_only:
        yield f"the chat template is that of {one.folder}, in place of the base's"
        return
    mine = read_vocabulary(one.files)
    theirs = Vocabulary(ids={})
    try:
        theirs = read_vocabulary(base)
    except InputError:
        yield f"{base.folder}: its tokenizer cannot be read, so the two were not compared"
    _check_fit(one, mine, rows)
    moved = mine.moved(theirs)
    if moved and not chosen:
        what = f"gives {counted(len(moved), 'token')} other ids than the base does"
        shown = some_of([shortened(token) for token in moved])
        remedy = f"Give --tokenizer base; or --tokenizer {one.folder} if this is what you want"
        raise refuse(f"{what} ({shown}): it is of another model", one.folder, remedy)
    new = mine.beyond(theirs) if theirs.ids else []
    more = f", with {counted(len(new), 'token')} more: {_listed(new)}" if new else ""
    yield f"the tokenizer is that of {one.folder}, in place of the base's{more}"
    lost = theirs.beyond(mine) if mine.ids else []
    if lost:
        what = f"lacks {counted(len(lost), 'token')} of the base's: {_listed(lost)}"
        yield f"{one.folder}: its tokenizer {what}"
    if moved:
        yield f"it gives {counted(len(moved), 'token')} other ids than the base's tokenizer"
    if not mine.ids:
        yield f"{one.folder}: nothing tells whether its tokenizer fits the embeddings"
    if _has_template(base) and not _has_template(one.files):
        yield f"{one.folder}: its tokenizer has no chat template, and the base's one goes with it"


def _check_fit(one: _Brought, vocabulary: Vocabulary, rows: int | None) -> None:
    token, last = vocabulary.last
    if rows is not None and last >= rows:
        what = f"token {shortened(token)} has id {last}, and the embeddings have {rows} rows"
        remedy = "Save the embeddings with the adapter (modules_to_save), or give --tokenizer base"
        raise InputError([Problem(what, one.folder, remedy)])


def _replaced(side_files: Sequence[SideFile], one: _Brought) -> list[SideFile]:
    """The base's files, with those that are brought in the place of the tokenizer's."""
    gone = _is_template if one.templates_only else _is_tokenizers
    kept = [file for file in side_files if not gone(file.name)]
    new = [
        SideFile(name=name, folder=one.files.folder, file=one.files.look(name))
        for name in one.names
    ]
    return sorted([*kept, *new], key=lambda file: file.name)


def _is_template(name: str) -> bool:
    return name in _TEMPLATE_FILES or name.startswith(f"{TEMPLATES}/")


def _is_tokenizers(name: str) -> bool:
    return name in _FILES or _is_template(name)


def _has_template(files: SmallFiles) -> bool:
    if any(map(_is_template, files.sizes)):
        return True
    if SETTINGS not in files.sizes:
        return False
    try:
        return bool(parse_object(files.read(SETTINGS), "", "").get("chat_template"))
    except InputError:
        return False


def _listed(tokens: Sequence[str]) -> str:
    return some_of([shortened(token) for token in tokens])
