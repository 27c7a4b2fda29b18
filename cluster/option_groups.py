"""Options that several commands share, as records that the commands take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import ParameterInfo

Command = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of such a record."""

    name: str
    hint: Any
    """Its type, annotated for typer."""
    default: Any
    """``inspect.Parameter.empty``: it must be given."""

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def kind(self) -> Any:
        """Its type without the annotations."""
        return get_args(self.hint)[0] if get_origin(self.hint) is Annotated else self.hint

    @property
    def info(self) -> ParameterInfo | None:
        """What typer is told about it."""
        found = (one for one in get_args(self.hint) if isinstance(one, ParameterInfo))
        return next(found, None)

    @property
    def help(self) -> str:
        """What it does, in words."""
        return " ".join(str(self.info.help).split()) if self.info is not None else self.name

    @property
    def flag(self) -> str:
        """How it is written on a command line."""
        declared = [one for one in getattr(self.info, "param_decls", ()) if one.startswith("--")]
        return declared[0] if declared else f"--{self.name.replace('_', '-')}"


def options_of(group: type) -> Iterator[Option]:
    """The options that a dataclass consists of, in its order."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield Option(name=field.name, hint=hints[field.name], default=default)


def with_options(**groups: type) -> Callable[[Command], Command]:
    """Makes of a command what typer is to see, which reads options off a signature.

    Args:
        groups: by the name of a parameter, the record whose fields take its place as options.
    """

    def changed(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            group = groups.get(parameter.name)
            parameters += [parameter] if group is None else map(_parameter, options_of(group))

        def called(**given: Any) -> None:
            records = {
                name: group(**{option.name: given.pop(option.name) for option in options_of(group)})
                for name, group in groups.items()
            }
            command(**records, **given)

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return changed


def _parameter(option: Option) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, keyword, default=option.default, annotation=option.hint)
