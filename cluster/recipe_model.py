"""The model of a recipe: the options of a merge themselves, read off the flags.

There is no second list: what is a field here is what ``PlanOptions``, ``RunOptions`` and
``HubOptions`` have, with the types, limits and words of the flags.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
)

from cluster.hub_options import HubOptions
from cluster.option_groups import Option, options_of
from cluster.options import size_in_bytes
from cluster.plan_options import PlanOptions
from cluster.run_options import RunOptions
from merge_core.combining import check_density
from merge_core.errors import InputError
from merge_core.stages import check_layers

NO_FIELDS = {
    "words": "base and adapters are fields of their own",
    "overwrite": "it removes an earlier merge, which nobody may do by a file that says so for good",
    "as_json": "it is about the answer of one command",
    "quiet": "the same",
    "debug": "the same",
}
"""Flags of a merge that recipes do not have, and why."""

_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _no_truth(value: Any) -> Any:
    """To Python true is 1, which nobody means who writes it."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number", "Give one")  # noqa: TRY004 - pydantic's
    return value


class AdapterEntry(BaseModel):
    """An adapter, and the weight that it is merged with."""

    model_config = _STRICT

    path: str = Field(min_length=1, description="A PEFT adapter: path, s3://, gs:// or hub id.")
    weight: Annotated[float | None, BeforeValidator(_no_truth)] = Field(
        default=None, description="What its change is multiplied by."
    )


def _entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _passes(check: Callable[[Any], object]) -> AfterValidator:
    """What its flag would be refused for is refused where it stands in the recipe."""

    def checked(value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except InputError as error:
            (problem,) = error.problems
            raise ValueError(problem.what, problem.remedy) from None
        return value

    return AfterValidator(checked)


_SHORT = {
    "anyOf": [
        {"type": "string", "description": "path or path@weight"},
        {"$ref": "#/$defs/AdapterEntry"},
    ]
}

_Entry = Annotated[AdapterEntry, BeforeValidator(_entry)]
_CHECKS = {
    "shard_size": _passes(size_in_bytes),
    "scratch_limit": _passes(size_in_bytes),
    "density": _passes(check_density),
    "layers": _passes(check_layers),
}


@functools.cache
def recipe_model() -> type[BaseModel]:
    """The pydantic model; a field that is not given is as if its flag were not."""
    fields: dict[str, Any] = {
        "base": (
            str | None,
            Field(default=None, description="Base checkpoint: path, s3://, gs:// or hub id."),
        ),
        "adapters": (
            list[_Entry],
            Field(min_length=1, description="What is merged into it."),
        ),
    }
    fields |= {option.name: _field(option) for option in recipe_options()}
    return create_model("Recipe", __config__=_STRICT, **fields)


def recipe_options() -> list[Option]:
    """The options of a merge that recipes have, beside base and adapters."""
    return [*options_of(PlanOptions), *options_of(RunOptions), *options_of(HubOptions)]


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    schema = recipe_model().model_json_schema()
    entry = schema["$defs"]["AdapterEntry"]
    entry.pop("title", None)
    schema["properties"]["adapters"]["items"] = _SHORT
    for name, described in [*schema["properties"].items(), *entry["properties"].items()]:
        described.pop("title", None)
        if described.get("default", 0) is None:
            described.pop("default")
        described.setdefault("description", name)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _field(option: Option) -> tuple[Any, Any]:
    default = None if option.is_required else option.default
    field = Field(
        default=default,
        description=option.help,
        ge=getattr(option.info, "min", None),
    )
    kind = option.kind | None
    if option.name in _CHECKS:
        kind = Annotated[kind, _CHECKS[option.name]]
    if {int, float} & {option.kind, *get_args(option.kind)}:
        kind = Annotated[kind, BeforeValidator(_no_truth)]
    return kind, field


if __name__ == "__main__":  # python -m cluster.recipe_model > docs/recipe.schema.json
    print(json.dumps(recipe_schema(), indent=1))
