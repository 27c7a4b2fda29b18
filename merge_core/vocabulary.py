"""The vocabulary of a tokenizer, read from its files: which token has which id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.errors import refuse
from merge_core.folders import SmallFiles
from merge_core.json_text import parse_object

WHOLE = "tokenizer.json"
VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS = "tokenizer_config.json"

_REMEDY = "Save the tokenizer again, or give --tokenizer base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Ids by token."""

    ids: Mapping[str, int]

    @property
    def last(self) -> tuple[str, int]:
        """The token of the highest id; empty and -1 without any."""
        return max(self.ids.items(), key=lambda item: item[1], default=("", -1))

    def beyond(self, other: Vocabulary) -> list[str]:
        """Tokens that ``other`` does not have, by their ids."""
        return sorted(self.ids.keys() - other.ids.keys(), key=self.ids.__getitem__)

    def moved(self, other: Vocabulary) -> list[str]:
        """Tokens that have another id in ``other``."""
        return sorted(t for t, n in self.ids.items() if other.ids.get(t, n) != n)


def read_vocabulary(files: SmallFiles) -> Vocabulary:
    """Of the tokenizer among ``files``; empty if it is of a kind that is not read here.

    Raises:
        InputError: a file is no JSON, or holds ids that are none.
    """
    ids: dict[str, Any] = {}
    if WHOLE in files.sizes:
        content = _read(files, WHOLE)
        model = content.get("model")
        if isinstance(model, dict):
            ids |= _of_model(model.get("vocab"))
        ids |= _contents(content.get("added_tokens"), "id")
    elif VOCABULARY in files.sizes:
        ids |= _read(files, VOCABULARY)
    if not ids:
        return Vocabulary(ids={})
    if ADDED in files.sizes:
        ids |= _read(files, ADDED)
    if SETTINGS in files.sizes:
        decoder = _read(files, SETTINGS).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            named = {key: value for key, value in decoder.items() if key.isdecimal()}
            texts = {n: v.get("content") for n, v in named.items() if isinstance(v, dict)}
            ids |= {text: int(n) for n, text in texts.items() if isinstance(text, str)}
    wrong = [token for token, number in ids.items() if type(number) is not int or number < 0]
    if wrong:
        raise refuse(f"gives token {wrong[0]!r} an id that is none", str(files.folder), _REMEDY)
    return Vocabulary(ids=ids)


def _of_model(vocabulary: object) -> dict[str, Any]:
    """A dictionary, or for Unigram a list of tokens with their scores."""
    if isinstance(vocabulary, dict):
        return vocabulary
    pairs = vocabulary if isinstance(vocabulary, list) else []
    return {str(pair[0]): n for n, pair in enumerate(pairs) if isinstance(pair, list) and pair}


def _contents(tokens: object, key: str) -> dict[str, Any]:
    listed = tokens if isinstance(tokens, list) else []
    return {str(t.get("content")): t.get(key) for t in listed if isinstance(t, dict)}


def _read(files: SmallFiles, name: str) -> dict[str, Any]:
    return parse_object(files.read(name), str(files.folder / name), _REMEDY)
