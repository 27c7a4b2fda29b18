"""What ``--help`` and a mistyped command show: one screen, options in groups, what was meant.

typer's own screen with rich draws a frame around each group, which leaves a merge's two dozen
options too little room on 80 columns; its plain one knows no groups.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WHAT, VALUES, WHERE = "Result", "Values", "Where"
STORES, TIME, TALK = "Stores", "Estimate", "Answer"
"""The groups of options, in this order behind those without a group; typer calls them panels."""

ONE_MERGE, CLUSTERS = "A merge", "Clusters"
"""The groups of commands."""

ARGUMENTS = "Arguments"

_ORDER = (ARGUMENTS, "Options", WHAT, VALUES, WHERE, STORES, TIME, TALK)
_NAMES = 26
"""Columns for the names of options, or else their help has too few."""

_CONTEXT = {"help_option_names": ["--help", "-h"]}

Rows = dict[str, list[tuple[str, str]]]


class Command(TyperCommand):
    """A command of raymeld."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments first, as people type them, then the options that must be given."""
        params = self.get_params(ctx)
        arguments = [_shown(p) for p in params if p.param_type_name == "argument"]
        needed = [
            f"{p.opts[0]} {_metavar(p)}"
            for p in params
            if p.param_type_name == "option" and p.required
        ]
        if not ctx.allow_interspersed_args:  # what stands behind the arguments is theirs
            return [*needed, "[OPTIONS]", *arguments]
        return [*arguments, *needed, "[OPTIONS]"]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The description, and its examples line by line."""
        del ctx
        _write_text(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options by group."""
        _write_rows(_rows_of(self.get_params(ctx), ctx), formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click: with another word about options that do not exist."""
        return _told(super().parse_args, ctx, args)


class Group(TyperGroup):
    """raymeld itself, or a command that has commands."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the name."""
        del ctx
        return ["COMMAND", "..."]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The description, and its examples line by line."""
        del ctx
        _write_text(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands by group, then options."""
        rows: Rows = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            group = command.rich_help_panel or "Commands"
            rows.setdefault(group, []).append((name, command.get_short_help_str(80)))
        _write_rows(rows, formatter)
        _write_rows(_rows_of(self.get_params(ctx), ctx), formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click: with another word about options that do not exist."""
        return _told(super().parse_args, ctx, args)


class App(typer.Typer):
    """A command line all of whose commands show themselves as above."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=Group,
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings=_CONTEXT,
            **settings,
        )

    def add(self, function: Callable[..., Any], name: str | None = None, **settings: Any) -> None:
        """Add a command."""
        own = settings.pop("context_settings", {})
        self.command(name, cls=Command, context_settings=_CONTEXT | own, **settings)(function)


def _told(parse: Callable[..., list[str]], ctx: Any, args: list[str]) -> list[str]:
    try:
        return parse(ctx, args)
    except Exception as error:  # click's own, whichever click it is
        _reword(error)
        raise


def _reword(error: Any) -> None:
    """In the words that typer has for commands: "Did you mean 'merge'?"."""
    if meant := getattr(error, "possibilities", None):
        named = " or ".join(f"{name!r}" for name in sorted(meant))
        error.message = f"No such option {error.option_name!r}. Did you mean {named}?"
        error.possibilities = None
    elif hasattr(error, "message"):
        error.message = error.message.removeprefix("Value error, ")  # pydantic's, within typer
        error.message += _nearest(error.message)


def _nearest(said: str) -> str:
    """Which of the values that an option has was meant: click names all of them, and none."""
    odd, of, choices = said.partition(" is not one of ")
    names = re.findall(r"'([^']+)'", choices)
    near = difflib.get_close_matches(odd.strip("'").lower(), names, n=1)
    return f" Did you mean {near[0]!r}?" if of and near else ""


def _write_text(text: str, formatter: Any) -> None:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        formatter.write_paragraph()
        with formatter.indentation():
            if paragraph.lstrip().startswith("raymeld "):
                for line in paragraph.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")
            else:
                formatter.write_text(" ".join(paragraph.split()))


def _rows_of(params: Iterable[Any], ctx: Any) -> Rows:
    rows: Rows = {group: [] for group in _ORDER}
    for param in params:
        if param.get_help_record(ctx) is None:
            continue
        if param.param_type_name == "argument":
            rows[ARGUMENTS].append((_metavar(param), _help(param)))
        else:
            last = TALK if rows[TALK] else "Options"
            group = last if param.name == "help" else param.rich_help_panel or "Options"
            rows[group].append((_name(param), _help(param)))
    return {group: entries for group, entries in rows.items() if entries}


def _write_rows(rows: Rows, formatter: Any) -> None:
    """In columns that all groups share, and without an empty line between them, which would cost
    a screen of 40 lines five of them.
    """
    names = max((len(name) for entries in rows.values() for name, _ in entries), default=0)
    width = min(names, _NAMES)
    formatter.write_paragraph()
    for group, entries in rows.items():
        if group != ARGUMENTS:  # the first rows, right below the usage that names them
            formatter.write(f"{group}:\n")
        with formatter.indentation():
            formatter.write_dl([(f"{name:{width}}", text) for name, text in entries], col_max=width)


def _name(param: Any) -> str:
    names = ", ".join(sorted([*param.opts, *param.secondary_opts], key=len))
    return names if param.is_flag else f"{names} {_metavar(param)}"


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _shown(argument: Any) -> str:
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _help(param: Any) -> str:
    """The help, and the default where there is one that says anything."""
    text, default = param.help or "", param.default
    if param.param_type_name == "argument" or param.is_flag or default in (None, 0) or not text:
        return text
    shown = getattr(default, "value", default)
    return f"{text}  [{shown:g}]" if isinstance(shown, float) else f"{text}  [{shown}]"
