"""The commit: accepting workers' parts, and making the directory a checkpoint, in that order.

A receipt is the acceptance. It is made durable before the part gets its final name, so that
after a crash the names that are missing can be given, and a late twin of an accepted attempt is
recognised and thrown away. config.json is written last of all: it is the one commit point.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_core import __version__
from merge_core.errors import RaymeldError
from merge_core.lease import is_held, taken_over
from merge_core.ledger import Receipt, TensorRecord, write_ledger
from merge_core.model_card import CARD
from merge_core.output import (
    parts_directory,
    receipts_directory,
    state_directory,
)
from merge_core.plan import MergePlan, Shard
from merge_core.published_config import config_to_publish
from merge_core.side_files import CONFIG, INDEX
from merge_core.storage import copy_durably, replaced, reported, sync_directory, write_durably
from merge_core.verify import FileCheck, Row


class Assembly:
    """The destination as its one writer of record sees it; rebuilt from the receipts.

    Args:
        run: of the lease under which it writes; with another one, every method raises.
    """

    def __init__(self, plan: MergePlan, out: Path, run: str) -> None:
        self._plan, self._out, self._run = plan, out, run
        self._fingerprint = plan.fingerprint
        self._receipts: dict[int, Receipt] = {}
        for index in range(len(plan.shards)):
            receipt = self._read_receipt(index)
            if receipt is not None:
                self._receipts[index] = receipt
                self._publish_shard(receipt)

    @property
    def receipts(self) -> dict[int, Receipt]:
        """Of the shards that are done, by their index."""
        return dict(self._receipts)

    def resume(self) -> dict[int, FileCheck]:
        """What proves, by shard, that an earlier run left what its receipts say.

        Removes what that run did not finish, so no worker of this one may have begun.
        """
        self._check_run()
        self._remove_parts("*.part")
        return {
            index: check_of(self._out, self._plan.shards[index].name, receipt, "digest")
            for index, receipt in self._receipts.items()
        }

    def forget(self, index: int) -> None:
        """Have a shard that failed its proof count as not done."""
        self._check_run()
        self._receipt_path(index).unlink(missing_ok=True)
        del self._receipts[index]

    def accept(self, receipt: Receipt) -> bool:
        """Take a finished part as the shard, unless another attempt was taken before.

        Calling it again with the same receipt is harmless.

        Raises:
            RaymeldError: the receipt or the part does not match the plan.
        """
        self._check_run()
        if not 0 <= receipt.shard < len(self._plan.shards):
            raise RaymeldError(f"the plan has no shard {receipt.shard}", receipt.worker)
        earlier = self._receipts.get(receipt.shard)
        if earlier is not None and earlier.part != receipt.part:
            (parts_directory(self._out) / Path(receipt.part).name).unlink(missing_ok=True)
            return False
        if earlier is None:
            try:
                self._check(receipt, self._plan.shards[receipt.shard])
                write_durably(self._receipt_path(receipt.shard), receipt.to_json())
            except RaymeldError:
                (parts_directory(self._out) / Path(receipt.part).name).unlink(missing_ok=True)
                raise
            self._receipts[receipt.shard] = receipt
        self._publish_shard(receipt)
        self._remove_parts(f"{self._plan.shards[receipt.shard].name}.*.part")
        return True

    def write_record(self) -> None:
        """Write index, side files and ledger, once every shard is accepted.

        Raises:
            RaymeldError: shards are missing.
        """
        self._check_run()
        missing = set(range(len(self._plan.shards))) - self._receipts.keys()
        if missing:
            raise RaymeldError(f"shards {sorted(missing)} are missing", str(self._out))
        config = config_to_publish(self._plan)
        files = {CONFIG: hashlib.sha256(config).hexdigest(), **self._write_side_files()}
        if len(self._plan.shards) > 1:
            index = index_json(self._plan)
            write_durably(self._out / INDEX, index)
            files[INDEX] = hashlib.sha256(index).hexdigest()
        write_ledger(
            state_directory(self._out) / "ledger.parquet",
            self._receipts.values(),
            {shard.index: shard.name for shard in self._plan.shards},
            {
                "raymeld": __version__,
                "fingerprint": self._fingerprint,
                "written": time.time(),
                "files": files,
            },
        )

    def publish(self, verified: Mapping[str, Any]) -> None:
        """Make OUT a checkpoint: the last inputs check, what was verified, then config.json.

        Raises:
            StorageError: an input changed during the merge.
            LeaseLostError: another merge has taken OUT over.
        """
        self._check_run()
        for file in self._plan.base_files:
            file.check(self._plan.base)
        for side in self._plan.side_files:
            side.file.check(side.folder)
        for adapter in self._plan.adapters:
            adapter.file.check(adapter.path)
            adapter.config_file.check(adapter.path)
        state = state_directory(self._out)
        write_durably(state / "verified.json", json.dumps(verified, indent=1).encode())
        self._check_run()  # again: looking at the inputs may have taken long
        write_durably(self._out / CONFIG, (state / CONFIG).read_bytes())
        remove_leftovers(self._out)

    def _remove_parts(self, pattern: str) -> None:
        """Parts of attempts that were killed, or that came too late."""
        for part in parts_directory(self._out).glob(pattern):
            part.unlink(missing_ok=True)

    def _check_run(self) -> None:
        if not is_held(self._out, self._run):
            raise taken_over(self._out)

    def _read_receipt(self, index: int) -> Receipt | None:
        """None if there is none of this plan: what it would speak of is merged again."""
        try:
            receipt = Receipt.from_json(self._receipt_path(index).read_bytes())
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        ours = receipt.fingerprint == self._fingerprint and receipt.shard == index
        return receipt if ours else None

    def _receipt_path(self, index: int) -> Path:
        return receipts_directory(self._out) / f"shard-{index:05}.json"

    def _publish_shard(self, receipt: Receipt) -> None:
        """Give an accepted part its final name, unless it has it already."""
        part = parts_directory(self._out) / receipt.part
        final = self._out / self._plan.shards[receipt.shard].name
        with reported(final):
            if part.exists():
                os.rename(part, final)
                sync_directory(self._out)

    def _check(self, receipt: Receipt, shard: Shard) -> None:
        """Compare what a worker says it did, and the file's size and header, with the plan."""
        part = parts_directory(self._out) / receipt.part
        where = f"{shard.name}, attempt {receipt.attempt} by {receipt.worker}"
        if receipt.fingerprint != self._fingerprint:
            raise RaymeldError(f"was made from plan {receipt.fingerprint[:12]}", where)
        said = [(t.tensor, t.dtype, t.shape, t.nbytes) for t in receipt.tensors]
        planned = [
            (t.target.name, t.target.dtype, t.target.shape, t.target.nbytes) for t in shard.tasks
        ]
        if said != planned:
            raise RaymeldError("its tensors are not those of the plan", where)
        header = shard.layout().header
        with reported(part), part.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.size or file.read(len(header)) != header:
                raise RaymeldError(f"its part ({size} bytes) is not as planned", where)

    def _write_side_files(self) -> dict[str, str]:
        """sha256 of each, by name."""
        card = self._plan.card.encode()
        write_durably(self._out / CARD, card)
        digests = {CARD: hashlib.sha256(card).hexdigest()}
        for side in self._plan.side_files:
            source, target = side.folder / side.file.name, self._out / side.name
            with reported(target):
                target.parent.mkdir(exist_ok=True)
            size, digests[side.name] = copy_durably(source, target)
            if size != side.file.size:
                raise replaced(source)
        return digests


def remove_leftovers(out: Path) -> None:
    """Remove what is of no use any more once OUT is published; nothing may fail then."""
    for leftover in (parts_directory(out), receipts_directory(out)):
        shutil.rmtree(leftover, ignore_errors=True)


def check_of(out: Path, file: str, receipt: Receipt, level: str) -> FileCheck:
    """What proves that an accepted shard is as its receipt says.

    Args:
        out: where it was accepted.
        file: its name there.
        level: ``structure`` or ``digest``, see ``merge_core.verify``.
    """
    rows = tuple(_row(file, record) for record in receipt.tensors)
    return FileCheck(path=str(out / file), level=level, rows=rows)


def _row(file: str, record: TensorRecord) -> Row:
    """What a receipt claims of a tensor, as verification wants it."""
    return Row(
        tensor=record.tensor,
        file=file,
        action=record.action,
        dtype=record.dtype,
        shape=record.shape,
        nbytes=record.nbytes,
        digest=record.digest,
    )


def index_json(plan: MergePlan) -> bytes:
    """model.safetensors.index.json, in the form in which transformers writes it."""
    weight_map = {task.target.name: shard.name for shard in plan.shards for task in shard.tasks}
    content = {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
