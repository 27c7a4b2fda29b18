"""Singular values of the largest deltas, from their factors: no delta is ever worked out.

With B = Q R and A^T = P S, both thin, B A = Q (R S^T) P^T: its singular values are those of the
small matrix R S^T (Golub and Van Loan, Matrix Computations, 8.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.explain import KINDS
from cluster.report.changes import changed
from cluster.report.evidence import Evidence
from merge_core.errors import RaymeldError
from merge_core.factors import FactorSource
from merge_core.layout import TensorSpec
from merge_core.plan import AdapterInput
from merge_core.stores.location import Access, locate
from merge_core.stores.store import FileIdentity
from merge_core.updates.factor import Factor

if TYPE_CHECKING:
    import torch

_NO_DIGESTS = "this merge kept no digests of its adapters, so nothing proves that they are the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Of one tensor's delta."""

    tensor: str
    values: tuple[float, ...]
    """Singular values, the largest first; empty where they are not known."""
    why: str = ""
    """Why they are not."""

    @property
    def stable_rank(self) -> float:
        """Sum of the squares relative to the largest: how many directions the delta has."""
        return sum(v * v for v in self.values) / self.values[0] ** 2 if self.values[0] else 0.0


def spectra(evidence: Evidence, most: int) -> list[Spectrum]:
    """Of the ``most`` tensors that changed most.

    The adapters must still lie where they were merged from, and be what was merged.
    """
    tasks = {task["target"]["name"]: task for task in evidence.tasks}
    access = evidence.status.out.access
    wanted = [tasks[row["tensor"]] for row in changed(evidence.tensors)[:most]]
    with ExitStack() as opened:
        try:
            sources = [
                opened.enter_context(closing(FactorSource(_input(adapter, access))))
                for adapter in evidence.plan["adapters"]
            ]
        except (RaymeldError, KeyError) as error:  # a KeyError: an old plan.json
            why = str(error) if isinstance(error, RaymeldError) else _NO_DIGESTS
            return [Spectrum(tensor=task["target"]["name"], values=(), why=why) for task in wanted]
        return [_spectrum(task, sources) for task in wanted]


def _spectrum(task: Mapping[str, Any], sources: Sequence[FactorSource]) -> Spectrum:
    name, updates = task["target"]["name"], task["updates"]
    others = sorted({KINDS.get(u["kind"], u["kind"]) for u in updates if u["kind"] != "low_rank"})
    if others:
        why = f"{', '.join(others)}: the delta is no product of factors"
        return Spectrum(tensor=name, values=(), why=why)
    try:
        values = singular_values([_factors(update, sources) for update in updates])
    except RaymeldError as error:
        return Spectrum(tensor=name, values=(), why=str(error))
    return Spectrum(tensor=name, values=values)


def singular_values(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, ...]:
    """Of the sum of the products B A, the largest first.

    Args:
        factors: pairs of B [out, rank] and A [rank, in], of any rank.
    """
    import torch

    b = torch.cat([b.double() for b, _ in factors], dim=1)
    a = torch.cat([a.double() for _, a in factors], dim=0)
    left = torch.linalg.qr(b).R
    right = torch.linalg.qr(a.T).R
    return tuple(torch.linalg.svdvals(left @ right.T).tolist())


def _factors(
    update: Mapping[str, Any], sources: Sequence[FactorSource]
) -> tuple[torch.Tensor, torch.Tensor]:
    """B, with the scaling in it, and A; of a transposed delta A^T and B^T."""
    a, b = (_matrix(update[name], sources[update["adapter"]]) for name in ("a", "b"))
    b = b * update["scaling"]
    return (a.T, b.T) if update["transposed"] else (b, a)


def _matrix(factor: Mapping[str, Any], source: FactorSource) -> torch.Tensor:
    import torch

    rows, columns = (
        None if factor[name] is None else tuple(factor[name]) for name in ("rows", "columns")
    )
    tensor = {**factor["tensor"], "shape": tuple(factor["tensor"]["shape"])}
    meant = Factor(tensor=TensorSpec(**tensor), rows=rows, columns=columns, blocks=factor["blocks"])
    return meant.taken_from(source.load(meant.tensor, torch.device("cpu")))


def _input(adapter: Mapping[str, Any], access: Access) -> AdapterInput:
    """As the plan had it, as far as reading its tensors needs."""
    file = FileIdentity(**adapter["file"])
    return AdapterInput(
        path=locate(adapter["path"], access),
        weight=adapter["weight"],
        peft_type=adapter["peft_type"],
        file=file,
        config_file=file,
        digests=adapter["tensors"],
    )
