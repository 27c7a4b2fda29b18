"""The options of a merge that goes to the hub, and the place that they describe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import typer

from cluster.help_screen import STORES
from cluster.options import size_in_bytes
from merge_core.errors import refuse
from merge_core.stores.location import Access, Location, Upload, locate, locate_out, onto_hub


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """What ``--out hf://org/name`` takes beside it."""

    state: Annotated[
        str | None,
        typer.Option(
            metavar="STATE",
            rich_help_panel=STORES,
            help="Of --out hf://: path or s3:// of its records.",
        ),
    ] = None
    public: Annotated[
        bool,
        typer.Option("--public", rich_help_panel=STORES, help="Anybody may see a new model."),
    ] = False
    scratch: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", rich_help_panel=STORES, help="Where shards wait to be sent to the hub."
        ),
    ] = None
    scratch_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", rich_help_panel=STORES, help="Most bytes there, a node."),
    ] = None

    def locate_out(self, out: str, access: Access) -> Location:
        """What OUT means.

        Raises:
            InputError: it is nowhere, or the options do not go with it.
        """
        place = locate_out(out, access)
        if place.scheme != "hf":
            self._refuse_all()
            return place
        if self.state is None:  # which who checks OUT has more words for
            return place
        limit = self.scratch_limit
        upload = Upload(
            state=locate(self.state, access, exists=lambda _: True),
            private=not self.public,
            scratch=None if self.scratch is None else str(_directory(self.scratch)),
            scratch_limit=None if limit is None else size_in_bytes(limit, "--scratch-limit"),
        )
        return onto_hub(place, upload)

    def locate_any(self, out: str | None, access: Access) -> Location | None:
        """The same for commands that do without OUT."""
        if out is None:
            self._refuse_all()
            return None
        return self.locate_out(out, access)

    def _refuse_all(self) -> None:
        """Nothing that was asked for may be passed over in silence."""
        for field in fields(self):
            if getattr(self, field.name) not in (None, False):
                option = f"--{field.name.replace('_', '-')}"
                remedy = "Leave it out, or give --out hf://org/name"
                raise refuse("goes with a merge onto the hub alone", option, remedy)


def _directory(text: str) -> Location:
    place = locate_out(text)
    if not place.is_local:
        raise refuse("is no directory of a node", f"--scratch {text}", "Give a path")
    return place
