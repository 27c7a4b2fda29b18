"""``raymeld push``: a finished merge onto the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.answering import answering
from cluster.help_screen import ONE_MERGE, App
from cluster.options import Debug, Json, Quiet


def register(app: App) -> None:
    """Add the command to the command line."""
    app.add(push, rich_help_panel=ONE_MERGE)


def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The --out of a finished merge.")],
    repo: Annotated[
        str, typer.Argument(metavar="ORG/NAME[@BRANCH]", help="The model; made if need be.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Anybody may see a new model.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="One that exists; main, unless given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge in the model.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put a finished merge onto the Hugging Face hub.

    All of it in one commit, with a model card. Given again it goes on where it stopped: what the
    hub holds is not sent again.

    raymeld push merged my-org/my-model
    """
    with answering(as_json=as_json, debug=debug, out=out):
        from cluster import console
        from cluster.talk import Talk
        from merge_core.push import push as push_merge
        from merge_core.stores.location import locate_model

        model = locate_model(repo, revision)
        talk = Talk(quiet=quiet, out=out)
        url = push_merge(
            out,
            model,
            private=not public,
            overwrite=overwrite,
            say=talk.say,
        )
        document = {"ok": True, "out": out, "model": model.root, "commit": url}
        console.answer([f"pushed   {url}"], document, as_json=as_json)
