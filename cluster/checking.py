"""A finished result verified on Ray: the same checks, spread over a cluster's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from actors.checker import Checker
from actors.events import ItemDone
from actors.identity import identify
from actors.metrics import driver_line
from actors.pool import Pool, node_resources
from cluster.loop import Loop
from cluster.session import session
from cluster.tasks import VERIFYING, checking, size_of
from cluster.timing import Timing
from cluster.workers import ClusterOptions, size_fleet
from merge_core.progress import Watch
from merge_core.reachable import refuse_private
from merge_core.stores.location import Location, Place
from merge_core.verify import FileCheck, FileResult, VerifyReport, verify


def verify_on_ray(
    out: Location,
    level: str,
    options: ClusterOptions,
    *,
    base: Place | None = None,
    adapters: Sequence[tuple[Place, float]] | None = None,
    watch: Watch,
    say: Callable[[str], None],
) -> VerifyReport:
    """Check a merged checkpoint with workers on Ray; see ``merge_core.verify.verify``.

    The driver reads headers, index and ledger; the workers read the tensors.

    Args:
        options: where, and with how many workers; they need no GPU.
        watch: called with the progress, once a second.
        say: called with every decision that a person may want to know about.

    Raises:
        InputError: as ``verify`` does.
        RaymeldError: the cluster cannot be reached, or its workers failed too often.
    """
    refuse_private(out)

    def spread(
        _check_file: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        with session(options.address, use_gpus=False):
            return _run(checks, options, watch, say)

    return verify(out, level, base=base, adapters=adapters, run=spread)


def _run(
    checks: Sequence[FileCheck],
    options: ClusterOptions,
    watch: Watch,
    say: Callable[[str], None],
) -> list[FileResult]:
    results: list[FileResult] = []

    def settle(event: ItemDone) -> ItemDone:
        results.append(event.result)
        return event

    say(driver_line())
    fleet = size_fleet(options, node_resources(), len(checks))
    for line in fleet.lines:
        say(line)
    pool = Pool(identify(), fleet.workers, Checker)
    timing = Timing(lambda _: None)  # OUT keeps the history of merges alone
    loop = Loop(pool, fleet, options.start_timeout, settle, say, watch, timing)
    loop.add([checking(check, size_of(check), VERIFYING) for check in checks])
    try:
        loop.run()
    finally:
        pool.close()
    return results
