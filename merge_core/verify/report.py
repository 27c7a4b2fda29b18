"""What a verification found: findings, and the report that gathers them.

Records only, and all of them picklable: they come back from the workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.stores.location import Location

LEVELS = ("structure", "digest", "numeric", "load")
"""``digest`` includes ``structure``; ``numeric`` and ``load`` include both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One failed check."""

    check: str
    """Which check failed: files, config, index, header, ledger, read, digest, base, adapter,
    copied, converted, merged, finite or load."""
    where: str
    """File, then tensor, then row: as much of it as is known, such as
    ``model.safetensors: model.norm.weight, row 3``."""
    what: str
    """What is wrong there, without a full stop."""

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome of one verification."""

    out: Location
    """The folder that was checked."""
    level: str
    """One of ``LEVELS``."""
    findings: tuple[Finding, ...]
    """Everything that is wrong; empty when nothing is."""
    files: int
    """Weight files that were checked."""
    tensors: int
    """Tensors in those files."""
    bytes_read: int
    """Tensor data read and compared, in bytes, of OUT and (``numeric``) of the base."""
    seconds: float
    """Wall time of the whole verification."""
    checks: tuple[str, ...]
    """What was checked, in words, in order."""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.findings


def at(file: str, tensor: str, row: int | None = None) -> str:
    """The ``where`` of a finding about a tensor or one of its rows (counted from 0)."""
    return f"{file}: {tensor}" if row is None else f"{file}: {tensor}, row {row}"
