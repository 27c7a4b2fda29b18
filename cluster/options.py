"""The options that several commands share."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.help_screen import STORES, TALK, VALUES, WHAT, WHERE
from merge_core.errors import refuse
from merge_core.updates.combined import Method, SignMethod


class Level(StrEnum):
    """What a verification looks at; each level includes structure, the last two digest."""

    STRUCTURE = "structure"
    DIGEST = "digest"
    NUMERIC = "numeric"
    LOAD = "load"


class Device(StrEnum):
    """Where deltas are computed."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Dtype(StrEnum):
    """Dtypes of a result."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter-name",
        metavar="NAME",
        rich_help_panel=VALUES,
        help="Which, if a folder has several adapters.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="WHOSE",
        rich_help_panel=WHAT,
        help="base or an adapter, if adapters bring one.",
    ),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url",
        metavar="URL",
        rich_help_panel=STORES,
        help="Of an S3 that is not Amazon's.",
    ),
]
Region = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=STORES, help="Of that S3.")
]
Anonymous = Annotated[
    bool,
    typer.Option(
        "--anonymous", rich_help_panel=STORES, help="Read public buckets without credentials."
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache", rich_help_panel=STORES, help="Fetch whole hub files to each node's cache."
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        rich_help_panel=WHAT,
        help="bfloat16, float16 or float32, not the base's.",
    ),
]
ShardSize = Annotated[
    str,
    typer.Option(metavar="SIZE", rich_help_panel=WHAT, help="Most bytes of an output file."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=WHERE, help="Most workers at a time."),
]
DeviceMapFile = Annotated[
    Path | None,
    typer.Option(
        "--device-map",
        metavar="FILE",
        rich_help_panel=WHERE,
        help="JSON of modules and cuda or cpu.",
    ),
]
KeepTied = Annotated[
    bool,
    typer.Option(
        "--keep-tied",
        rich_help_panel=VALUES,
        help="Leave tied embeddings and head one tensor.",
    ),
]
Combine = Annotated[
    Method | None,
    typer.Option(
        "--combine",
        metavar="METHOD",
        rich_help_panel=VALUES,
        help="sum, linear, svd, ties, dare_ties etc.  [sum]",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=VALUES,
        help="Of elements, what pruning leaves (ties, dare).",
    ),
]
MajoritySign = Annotated[
    SignMethod | None,
    typer.Option(
        "--majority-sign",
        metavar="HOW",
        rich_help_panel=VALUES,
        help="What elects a sign (ties): total or frequency.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", rich_help_panel=VALUES, help="For what dare drops.  [0]"),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        rich_help_panel=WHAT,
        help="A stage: these alone, as 0-39 or 40-79,rest.",
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        rich_help_panel=VALUES,
        help="Decode a base in GPTQ, AWQ, bitsandbytes or FP8.",
    ),
]
SimulateNf4 = Annotated[
    bool,
    typer.Option(
        "--simulate-nf4",
        rich_help_panel=VALUES,
        help="Round the base through NF4, as QLoRA saw it.",
    ),
]
StartTimeout = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", rich_help_panel=WHERE, help="Wait so long for workers."),
]
RayAddress = Annotated[
    str,
    typer.Option(
        envvar="RAY_ADDRESS",
        metavar="ADDRESS",
        rich_help_panel=WHERE,
        help="A Ray cluster, local (own) or inline.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=TALK, help="Answer with one JSON document on stdout."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=TALK, help="No talk on stderr.")
]
Debug = Annotated[
    bool, typer.Option("--debug", rich_help_panel=TALK, help="Show the traceback of an error.")
]


def size_in_bytes(text: str, option: str = "--shard-size") -> int:
    """The bytes that a size such as ``2GB`` or ``512 MiB`` means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)i?[bB]?", text.strip())
    if match is None or len(text) > 20:
        raise refuse(f"{text!r} is no size", option, "Give a size such as 2GB")
    step = 1024 if "i" in text else 1000
    return int(float(match[1]) * step ** " kMGT".index(match[2].replace("K", "k") or " "))


def bytes_a_second(text: str, option: str) -> float:
    """What a bandwidth such as ``1.25GB/s`` or ``10Gbit/s`` means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT])(B|bit)/s", text.strip())
    if match is None or len(text) > 20 or not float(match[1]):
        raise refuse(f"{text!r} is no bandwidth", option, "Give one such as 1.25GB/s or 10Gbit/s")
    amount = float(match[1]) * 1000.0 ** " kMGT".index(match[2].replace("K", "k"))
    return amount if match[3] == "B" else amount / 8


def node_counts(text: str) -> list[int]:
    """The numbers in a list such as ``1,8,64``, each of them once, in order."""
    if re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5}){0,19}", text) is None:
        raise refuse(f"{text!r} is no list of nodes", "--nodes", "Give numbers such as 1,8,64")
    return sorted({int(count) for count in text.split(",")})


def refuse_workers(workers: int | None, cpu_workers: int) -> None:
    """Refuse to count workers where one process does it all."""
    if workers is not None or cpu_workers:
        option = "--workers" if workers is not None else "--cpu-workers"
        remedy = "Leave it out, or give an --address such as local"
        raise refuse("inline has no workers to count", option, remedy)
