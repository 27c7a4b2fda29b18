"""OUT for one merge: whether it may go there, and the lease that keeps all others off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from merge_core.commit import remove_leftovers
from merge_core.destination import check_location
from merge_core.errors import InputError, Problem, RaymeldError, gathered
from merge_core.factors import seal
from merge_core.holder import Holder
from merge_core.lease import Lease, live_holder
from merge_core.output import RECEIPTS, check_usable, is_finished, prepare
from merge_core.plan import MergePlan
from merge_core.stored_head import check_stored_head
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.upload import check_level, check_model, make_ready
from merge_core.verify import Sources, refuse_unchecked


def begin(plan: MergePlan, out: Location, level: str) -> MergePlan:
    """Check where ``out`` lies, and read and check the adapters; writes nothing.

    Returns:
        The plan, sealed.

    Raises:
        InputError: ``out``, the base's head or the adapters cannot be used, or not be verified at
            ``level``.
    """
    problems = [*check_level(out, level), *check_location(out, plan)]
    with gathered(problems):
        if level == "numeric":  # what it cannot check is better known before the merge than after
            adapters = tuple((a.path, a.weight) for a in plan.adapters)
            method = plan.combination.method
            refuse_unchecked(Sources(base=plan.base, adapters=adapters, method=method))
    with gathered(problems):
        check_stored_head(plan)
    if problems:
        raise InputError(problems)
    return seal(plan)


@contextlib.contextmanager
def claim(
    plan: MergePlan, out: Location, *, overwrite: bool, say: Callable[[str], None]
) -> Iterator[Holder | None]:
    """Make ``out`` ready for ``plan``, which must be sealed, and keep every other merge off it.

    Args:
        say: told that the lease of a merge that is perhaps gone is waited for.

    Yields:
        The holder of the lease, or None if ``out`` holds this very result already.

    Raises:
        InputError: it holds something else, or another merge is at work there.
        StorageError: it cannot be made, or the disk is too small.
    """
    if not overwrite and holds_result(out, plan, say):
        yield None
        return
    check_out(out, plan, overwrite=overwrite)
    with Lease(out, say) as lease:
        if not overwrite and is_finished(out, plan):  # by the merge that was waited for
            yield None
        else:
            prepare(out, plan, overwrite=overwrite)
            make_ready(out, plan, overwrite=overwrite)
            yield lease.holder


def check_out(out: Location, plan: MergePlan, *, overwrite: bool) -> None:
    """Raise what ``claim`` would of what lies in ``out``, for ``plan``, which must be sealed; write
    nothing.

    Raises:
        InputError: with all that stands against it.
        StorageError: the disk is too small, or the hub cannot be asked.
    """
    problems: list[Problem] = []
    with gathered(problems):
        check_usable(out, plan, overwrite=overwrite)
    with gathered(problems):
        check_model(out, plan, overwrite=overwrite)
    if problems:
        raise InputError(problems)


def holds_result(out: Location, plan: MergePlan, say: Callable[[str], None]) -> bool:
    """Whether ``out`` holds this very result; ``plan`` must be sealed.

    A machine that dies right after the commit leaves receipts there: they are removed, if nobody is
    at work who may need his own.
    """
    if not is_finished(out, plan):
        return False
    with contextlib.suppress(RaymeldError):  # they harm nobody
        if any(open_store(out).list(RECEIPTS)) and live_holder(out) is None:
            with Lease(out, say):
                if is_finished(out, plan):
                    remove_leftovers(out)
    return True
