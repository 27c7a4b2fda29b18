"""The tables of tuners agree with the installed PEFT, with the tests and with the documentation."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tuners import CONFIGS

from merge_core.peft_fields import INERT_FIELDS, NORM_FIELDS, READ_FIELDS
from merge_core.peft_tuners import TUNERS
from merge_core.refused_tuners import REFUSED, REFUSED_VARIANTS
from merge_core.tuner import COMMON_FIELDS
from merge_core.tuning import TESTED_PEFT

DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"
OTHERWISE = {"LORA", "TRAINABLE_TOKENS", "LN_TUNING"}
"""Merged without PEFT."""


def installed() -> set[str]:
    kinds = {*PEFT_TYPE_TO_CONFIG_MAPPING, *PEFT_TYPE_TO_TUNER_MAPPING}
    return {str(getattr(kind, "value", kind)) for kind in kinds}


def test_the_installed_peft_is_the_one_that_merges_are_planned_for() -> None:
    assert peft.__version__.rpartition(".")[0] == TESTED_PEFT


def test_every_tuner_of_the_installed_peft_is_in_one_table() -> None:
    assert installed() | {"BONE", "KASA"} == OTHERWISE | TUNERS.keys() | REFUSED.keys()
    assert not TUNERS.keys() & REFUSED.keys()


def test_every_tuner_that_is_merged_is_tested() -> None:
    assert CONFIGS.keys() == TUNERS.keys() | {"LN_TUNING"}


@pytest.mark.parametrize("kind", [*TUNERS, "LN_TUNING"])
def test_every_field_of_a_tuner_is_in_one_table(kind: str) -> None:
    own = TUNERS[kind].fields if kind in TUNERS else NORM_FIELDS
    tables = [own, INERT_FIELDS, REFUSED_VARIANTS.keys()]
    tables += [COMMON_FIELDS] if kind in TUNERS else []
    config = PEFT_TYPE_TO_CONFIG_MAPPING[{"KASA": "LORA"}.get(kind, kind)]
    fields = {field.name for field in dataclasses.fields(config)}
    if kind in ("ADALORA", "KASA"):  # what they do not know of LoRA's must be off
        fields -= READ_FIELDS - own
    for name in fields:
        assert sum(name in table for table in tables) == 1, name
    assert own <= fields


def test_the_documentation_lists_them() -> None:
    rows = re.findall(r"^\| ([A-Z0-9_, ]+)(?:: [^|]+)? \|", DOCS.read_text(), re.MULTILINE)
    named = [name for row in rows for name in row.split(", ")]

    assert sorted(named) == sorted({*TUNERS, *REFUSED, "LN_TUNING"})
