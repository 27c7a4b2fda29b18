"""The commit: accepting workers' parts, and making the folder a checkpoint, in that order.

A receipt is the acceptance. It is made durable before the part gets its final name, so that
after a crash the names that are missing can be given, and a late twin of an accepted attempt is
recognised and thrown away. config.json is written last of all: it is the one commit point. Where
OUT is on the hub, its commit comes right before, which is made once however often it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from merge_core import __version__
from merge_core.carrying import carry
from merge_core.errors import AbsentError, RaymeldError, StorageError, TakenError
from merge_core.lease import is_held, taken_over
from merge_core.ledger import Receipt, TensorRecord, fold_ledger
from merge_core.model_card import CARD
from merge_core.output import (
    LEDGER,
    RECEIPTS,
    STAGED_CONFIG,
    VERIFIED,
    receipt_name,
)
from merge_core.plan import MergePlan, Shard
from merge_core.published_config import config_to_publish
from merge_core.side_files import CONFIG, INDEX
from merge_core.stores.location import Location
from merge_core.stores.opening import check_unchanged, open_store
from merge_core.upload import commit_out
from merge_core.verify import FileCheck, Row


class Assembly:
    """The destination as its one writer of record sees it; rebuilt from the receipts.

    Args:
        run: of the lease under which it writes; with another one, every method raises.
    """

    def __init__(self, plan: MergePlan, out: Location, run: str) -> None:
        self._plan, self._out, self._run = plan, out, run
        self._store = open_store(out)
        self._fingerprint = plan.fingerprint
        self._receipts: dict[int, Receipt] = {}
        there = {listed.name for listed in self._store.list(RECEIPTS)}
        for index in range(len(plan.shards)):
            receipt = self._read_receipt(index) if receipt_name(index) in there else None
            if receipt is not None:
                self._receipts[index] = receipt
                with contextlib.suppress(StorageError):  # its proof will tell
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
        self._store.sweep()  # first: what is complete by now is seen by the next step
        self._remove_unaccepted()
        return {
            index: check_of(self._out, self._plan.shards[index].name, receipt, "digest")
            for index, receipt in self._receipts.items()
        }

    def forget(self, index: int) -> None:
        """Have a shard that failed its proof count as not done."""
        self._drop_receipt(index)
        self._store.delete(self._plan.shards[index].name)

    def accept(self, receipt: Receipt) -> bool:
        """Take a finished part as the shard, unless another attempt was taken before.

        Calling it again with the same receipt is harmless.

        Raises:
            RaymeldError: the receipt or the part does not match the plan.
        """
        self._check_run()
        if not 0 <= receipt.shard < len(self._plan.shards):
            raise RaymeldError(f"the plan has no shard {receipt.shard}", receipt.worker)
        shard, earlier = self._plan.shards[receipt.shard], self._receipts.get(receipt.shard)
        if earlier is not None and earlier.part != receipt.part:
            self._store.sweep(shard.name)
            return False
        if earlier is None:
            self._check(receipt, shard)
            self._store.put(receipt_name(shard.index), receipt.to_json())
            self._receipts[shard.index] = receipt
        try:
            self._publish_shard(receipt)
            self._check_header(receipt, shard)
        except StorageError as error:
            self._drop_receipt(shard.index)
            if not isinstance(error, TakenError):  # what another writer made is not ours to remove
                self._store.delete(shard.name)
            self._store.sweep(shard.name)
            raise
        with contextlib.suppress(StorageError):  # it is accepted; the last sweep comes at the end
            if is_held(self._out, self._run):
                self._store.sweep(shard.name)
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
            self._store.put(INDEX, index)
            files[INDEX] = hashlib.sha256(index).hexdigest()
        names = {shard.index: shard.name for shard in self._plan.shards}
        about = {
            "raymeld": __version__,
            "fingerprint": self._fingerprint,
            "written": time.time(),
            "files": files,
        }
        self._store.put(LEDGER, fold_ledger(self._receipts.values(), names, about))

    def publish(self, verified: Mapping[str, Any]) -> None:
        """Make OUT a checkpoint: the last inputs check, what was verified, then config.json.

        Raises:
            StorageError: an input changed during the merge; or somebody else has committed to the
                model on the hub that OUT is.
            LeaseLostError: another merge has taken OUT over.
        """
        self._check_run()
        for file in self._plan.base_files:
            check_unchanged(self._plan.base, file)
        for side in self._plan.side_files:
            check_unchanged(side.folder, side.file)
        for adapter in self._plan.adapters:
            check_unchanged(adapter.path, adapter.file)
            check_unchanged(adapter.path, adapter.config_file)
        self._store.put(VERIFIED, json.dumps(verified, indent=1).encode())
        self._check_run()  # again: looking at the inputs may have taken long
        if self._out.upload is not None:
            commit_out(self._out, self._plan)
        self._store.put(CONFIG, self._store.get(STAGED_CONFIG))
        remove_leftovers(self._out)

    def _check_run(self) -> None:
        if not is_held(self._out, self._run):
            raise taken_over(self._out)

    def _read_receipt(self, index: int) -> Receipt | None:
        """None if there is none of this plan: what it would speak of is merged again."""
        try:
            receipt = Receipt.from_json(self._store.get(receipt_name(index)))
        except (AbsentError, ValueError, TypeError, KeyError):
            return None
        ours = receipt.fingerprint == self._fingerprint and receipt.shard == index
        return receipt if ours else None

    def _drop_receipt(self, index: int) -> None:
        del self._receipts[index]  # first: if the store fails now, no attempt is taken for a twin
        self._check_run()
        self._store.delete(receipt_name(index))

    def _remove_unaccepted(self) -> None:
        """Remove shards without a receipt, of a run that died while it forgot them, or whose last
        request to complete them came late: they would be in the way of others of their name.
        """
        there = {listed.name for listed in self._store.list()}
        for shard in self._plan.shards:
            if shard.index not in self._receipts and shard.name in there:
                self._store.delete(shard.name)

    def _publish_shard(self, receipt: Receipt) -> None:
        """Give an accepted part its final name, unless it has it already."""
        shard = self._plan.shards[receipt.shard]
        self._store.publish(receipt.part, shard.name, shard.size)

    def _check(self, receipt: Receipt, shard: Shard) -> None:
        """Compare what a worker says it did with the plan."""
        where = _described(receipt, shard)
        if receipt.fingerprint != self._fingerprint:
            raise RaymeldError(f"was made from plan {receipt.fingerprint[:12]}", where)
        said = [(t.tensor, t.dtype, t.shape, t.nbytes) for t in receipt.tensors]
        planned = [
            (t.target.name, t.target.dtype, t.target.shape, t.target.nbytes) for t in shard.tasks
        ]
        if said != planned:
            raise RaymeldError("its tensors are not those of the plan", where)

    def _check_header(self, receipt: Receipt, shard: Shard) -> None:
        """Look at what was published: parts of some stores cannot be read before."""
        header = shard.layout().header
        with closing(self._store.open(self._store.look(shard.name))) as reader:
            if bytes(reader.read(0, len(header))) != header:
                raise StorageError("its header is not as planned", _described(receipt, shard))

    def _write_side_files(self) -> dict[str, str]:
        """sha256 of each, by name."""
        card = self._plan.card.encode()
        self._store.put(CARD, card)
        carried = {side.name: carry(side, self._out) for side in self._plan.side_files}
        return {CARD: hashlib.sha256(card).hexdigest(), **carried}


def _described(receipt: Receipt, shard: Shard) -> str:
    return f"{shard.name}, attempt {receipt.attempt} by {receipt.worker}"


def remove_leftovers(out: Location) -> None:
    """Remove what is of no use any more once OUT is published; nothing may fail then."""
    store = open_store(out)
    with contextlib.suppress(StorageError):
        store.sweep()
        for listed in store.list(RECEIPTS):
            store.delete(listed.name)


def check_of(out: Location, file: str, receipt: Receipt, level: str) -> FileCheck:
    """What proves that an accepted shard is as its receipt says.

    Args:
        out: where it was accepted.
        file: its name there.
        level: ``structure`` or ``digest``, see ``merge_core.verify``.
    """
    rows = tuple(_row(file, record) for record in receipt.tensors)
    return FileCheck(file=out / file, level=level, rows=rows)


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
