"""Merges as Ray Jobs, seen from outside of the cluster: submitted, found, read, stopped.

The name of a job is its lock. It holds a digest of what is merged where, and a number: Ray takes
no name twice, so of two that submit the same merge at the same time one is refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.authentication import (
    TOKEN_FILE,
    borrowed_environment,
    reload_authentication,
    use_token_if_there_is_one,
)
from cluster.log_lines import FORM, plain
from cluster.merge_words import MergeWords
from merge_core.errors import InterruptedMergeError, RaymeldError, refuse

STOP_SECONDS = 60
"""What a driver gets between SIGTERM and SIGKILL: Ray's own 3 s are too few to end a Ray session
and to remove the parts of files that workers left."""

ANSWER_SECONDS = (10, 60)
"""For a connection, and then for an answer. Ray sets no limit: a dead connection would hang."""

_ENTRYPOINT = "python -P -m cluster.cli "
"""With what the head has, but with the raymeld of the wheel. -P: Ray starts a driver in the
directory that Ray was started in, where a package called ``cluster`` may lie."""

_NAME = re.compile(r"raymeld-(?P<recipe>[0-9a-f]{12})-(?P<number>[1-9]\d*)")
_ENDINGS = {"SUCCEEDED": 0, "STOPPED": InterruptedMergeError.exit_code}
_SUBMISSION = "raymeld-submission"

_NO_ANSWER = (OSError, ValueError, KeyError, TypeError)
"""All exceptions of requests are OSErrors; the others come of answers that no dashboard gives."""


class NoAnswerError(RaymeldError):
    """The dashboard did not answer, or not sensibly; it may do so in a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A merge that was submitted to a cluster."""

    name: str
    """``raymeld-<recipe>-<number>``."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    words: str
    """The command line that it runs, from ``merge`` on."""
    message: str
    """What Ray has to say about it."""
    started: float
    """Seconds since 1970."""
    ended: float | None
    """Seconds since 1970, or None while it is alive."""
    driver_exit_code: int | None
    """None too where no driver ran, or where it was stopped."""
    submission: str
    """Tells one attempt to submit a job from another at the same name."""

    @property
    def alive(self) -> bool:
        """Whether it runs, or will."""
        return self.status in {"PENDING", "RUNNING"}

    @property
    def exit_code(self) -> int | None:
        """The exit code of the merge, as if it had run here; None while it is alive."""
        if self.alive or self.status in _ENDINGS:
            return _ENDINGS.get(self.status)
        code = self.driver_exit_code or RaymeldError.exit_code
        return code if code > 0 else 128 - code  # a signal, as shells count it


def next_name(recipe: str, jobs: Sequence[Job]) -> str:
    """The name for one more job of ``recipe``.

    Raises:
        InputError: one of them is alive.
    """
    numbers = [0]
    for job in jobs:
        match = _NAME.fullmatch(job.name)
        if match is None or match["recipe"] != recipe:
            continue
        if job.alive:
            raise _taken(job.name, job.status)
        numbers.append(int(match["number"]))
    return f"raymeld-{recipe}-{max(numbers) + 1}"


def _taken(name: str, status: str) -> RaymeldError:
    remedy = f"Look at it with: raymeld jobs logs --follow {name}"
    return refuse(f"this merge is under way already ({status})", f"job {name}", remedy)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Jobs]:
    """The jobs of the cluster whose dashboard is at ``address``, such as http://head:8265.

    The token is shown if there is one. The environment is restored.

    Raises:
        InputError: ``address`` is not of a dashboard.
        RaymeldError: no answer from there, or it does not take the token.
    """
    url = _dashboard(address)
    with borrowed_environment():
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would prefer them to what it is told
        known = use_token_if_there_is_one()
        from ray.job_submission import JobSubmissionClient

        reload_authentication()
        for module in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and every end
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with _translated(url):
            client = JobSubmissionClient(url)
        client._do_request = functools.partial(client._do_request, timeout=ANSWER_SECONDS)  # noqa: SLF001 - there is no public way
        yield Jobs(client, url, token_known=known)


def _dashboard(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "http", address
    if scheme not in {"http", "https"} or rest in {"", "auto", "local", "inline"}:
        remedy = "Give the dashboard's address, such as http://head:8265"
        raise refuse("no cluster takes jobs there", f"--address {address}", remedy)
    return f"{scheme}://{rest.rstrip('/')}"


class Jobs:
    """The jobs of one cluster. Every method raises RaymeldError if the cluster does not answer."""

    def __init__(self, client: Any, address: str, *, token_known: bool) -> None:
        self._client = client
        self.address = address
        self.token_known = token_known
        """Whether a token is sent, or the caller wants none."""

    def all(self) -> list[Job]:
        """All merges that were ever submitted, the oldest first."""
        with _translated(self.address):
            found = [_job(details) for details in self._client.list_jobs()]
        named = [job for job in found if _NAME.fullmatch(job.name)]
        return sorted(named, key=lambda job: (job.started, job.name))

    def find(self, name: str) -> Job:
        """The job ``name``.

        Raises:
            InputError: it is no name of a merge, or the cluster knows no such job.
        """
        if _NAME.fullmatch(name) is None:
            remedy = "Take one from: raymeld jobs list"
            raise refuse("is not the name of a merge", f"job {name}", remedy)
        try:
            with _translated(self.address):
                return _job(self._client.get_job_info(name))
        except NoAnswerError as error:
            if "status code 404" in error.what:
                what, remedy = f"unknown to {self.address}", "Look at: raymeld jobs list"
                raise refuse(what, f"job {name}", remedy) from None
            raise

    def submit(self, name: str, merge: MergeWords, wheel: Path, submission: str) -> None:
        """Have the head run ``merge`` without reserving anything there for the driver.

        Args:
            submission: text that nobody else chooses.

        Raises:
            InputError: somebody else took ``name`` just before.
        """
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        if FORM in os.environ:
            variables[FORM] = os.environ[FORM]
        environment = {"py_modules": [str(wheel)], "env_vars": variables}
        try:
            with _translated(self.address):
                self._client.submit_job(
                    entrypoint=_ENTRYPOINT + shlex.join(merge.words),
                    submission_id=name,
                    runtime_env=environment,
                    metadata={_SUBMISSION: submission},
                )
        except NoAnswerError as error:
            job = self._found_after(error, name)
            if job.submission != submission:
                raise _taken(name, job.status) from None

    def _found_after(self, error: NoAnswerError, name: str) -> Job:
        """The job, if there is one after all: only the answer was lost, or the name was taken."""
        with contextlib.suppress(RaymeldError):
            return self.find(name)
        raise error

    def stop(self, name: str) -> bool:
        """Ask a job to stop, for which it has STOP_SECONDS; False if nobody runs it (yet)."""
        with _translated(self.address):
            return bool(self._client.stop_job(name))

    def log(self, name: str) -> str:
        """Everything that the driver has printed so far."""
        with _translated(self.address):
            return str(self._client.get_job_logs(name))

    def tail(self, name: str) -> AsyncIterator[str]:
        """The log from its start on, in pieces, and then what is added to it. Raises anything."""
        stream: AsyncIterator[str] = self._client.tail_job_logs(name)
        return stream


def _job(details: Any) -> Job:
    return Job(
        name=details.submission_id or "",
        status=details.status.value,
        words=details.entrypoint.removeprefix(_ENTRYPOINT),
        message=plain(details.message or ""),
        started=(details.start_time or 0) / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        driver_exit_code=details.driver_exit_code,
        submission=(details.metadata or {}).get(_SUBMISSION, ""),
    )


@contextlib.contextmanager
def _translated(address: str) -> Iterator[None]:
    """Tell in one paragraph what Ray raises when it cannot talk to a cluster."""
    from ray.exceptions import AuthenticationError

    where = f"--address {address}"
    try:
        yield
    except AuthenticationError as error:
        what = f"the cluster does not let you in: {_gist(error, first=True)}"
        remedy = (
            f"Put the token of the cluster into {TOKEN_FILE} or RAY_AUTH_TOKEN; on its head,"
            " `ray get-auth-token` shows it."
        )
        raise RaymeldError(what, where, remedy) from error
    except RuntimeError as error:  # how Ray tells of any answer but 200
        raise NoAnswerError(_gist(error), where, "Look at the dashboard there.") from error
    except _NO_ANSWER as error:
        remedy = (
            "Is the cluster up, and is this the address of its dashboard (port 8265, perhaps"
            " through `ssh -L`), not that of its GCS (6379)?"
        )
        raise NoAnswerError(f"no Ray dashboard answers: {_gist(error)}", where, remedy) from error


def _gist(error: Exception, *, first: bool = False) -> str:
    """One line of the many: the last says what, unless it is advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    if not lines:
        return type(error).__name__
    return lines[0 if first else -1].rstrip(".")
