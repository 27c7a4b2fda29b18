"""The options that several commands share."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
        help="Which adapter, of several in one folder, such as checkpoint-500.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="base|ADAPTER", help="Whose tokenizer the result gets, if adapters bring one."
    ),
]
EndpointUrl = Annotated[
    str | None, typer.Option("--endpoint-url", help="Of an S3 that is not Amazon's.")
]
Region = Annotated[str | None, typer.Option(help="Of the S3.")]
Anonymous = Annotated[
    bool, typer.Option("--anonymous", help="Read public S3 buckets without credentials.")
]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Dtype of the result.")]
ShardSize = Annotated[str, typer.Option(help="Size limit of an output file, such as 2GB.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Most workers at a time.")]
DeviceMapFile = Annotated[
    Path | None, typer.Option("--device-map", help="JSON of module names and cuda or cpu.")
]
KeepTied = Annotated[
    bool,
    typer.Option(
        "--keep-tied",
        help="Leave tied embeddings and head one tensor, whatever was trained of either.",
    ),
]
Combine = Annotated[
    Method | None,
    typer.Option(
        "--combine",
        metavar="METHOD",
        help="How adapters become one: sum (default), cat, linear, svd, ties, dare_linear,"
        " dare_ties, magnitude_prune; the last four also with _svd behind.",
    ),
]
Density = Annotated[
    float | None, typer.Option(help="Share of elements that pruning leaves (ties, dare, ...).")
]
MajoritySign = Annotated[
    SignMethod | None, typer.Option("--majority-sign", help="What elects a sign (ties).")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of what dare drops; 0 if not given.")]
Layers = Annotated[
    str | None,
    typer.Option(help="Merge in stages: only files with these layers, such as 0-39 or 40-79,rest."),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Decode a quantised base (GPTQ, AWQ, bitsandbytes, FP8) to the dtype of its config.",
    ),
]
SimulateNf4 = Annotated[
    bool,
    typer.Option(
        "--simulate-nf4",
        help="Round the base's linear layers through NF4 first, as QLoRA saw them in training.",
    ),
]
StartTimeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for the first worker.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No talk on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def size_in_bytes(text: str) -> int:
    """The bytes that a size such as ``2GB`` or ``512 MiB`` means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)i?[bB]?", text.strip())
    if match is None or len(text) > 20:
        raise refuse(f"{text!r} is no size", "--shard-size", "Give a size such as 2GB")
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
