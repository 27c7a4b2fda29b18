"""One job, watched until it ends: its log as it grows, each character once, its stop, its end.

Connections may break as often as they like.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from cluster.jobs import Job, Jobs, NoAnswerError
from merge_core.errors import InputError, RaymeldError

POLL_SECONDS = 0.5
"""How often the job is looked at while its log says nothing."""

QUIET_SECONDS = 60.0
"""After so long without a word the connection may be dead without having told: it is replaced."""

PATIENCE_SECONDS = 300.0
"""How long a cluster may give no answer at all: a head restarts, a laptop changes its network."""

LOG_SECONDS = 10.0
"""As PATIENCE_SECONDS, for the log alone: a job's end is told even where its log is lost."""

Answer = TypeVar("Answer")


class Watch:
    """Watches the job ``name``.

    Every method raises RaymeldError once the cluster gave no answer for PATIENCE_SECONDS, no longer
    takes the token, or has forgotten the job.

    Args:
        say: called with a line whenever something about the connection is worth knowing.
        heed: called at least every POLL_SECONDS, unless the cluster keeps an answer back; what it
            raises ends the watching.
    """

    def __init__(
        self, jobs: Jobs, name: str, say: Callable[[str], Any], heed: Callable[[], None]
    ) -> None:
        self._jobs, self._name, self._say, self._heed = jobs, name, say, heed
        self._seen = 0  # characters written: a new connection starts at the first of the log

    def follow(self, write: Callable[[str], Any]) -> Job:
        """Give the log to ``write``, in pieces, until the job has ended; returns how it ended.

        A second call, after an interrupt, goes on where the first one stopped.
        """
        while True:
            with contextlib.closing(_Stream(self._jobs.tail(self._name))) as stream:
                self._read(stream, write)
            job = self.look()
            missing = self._catch_up(write)  # streams trail behind, or do not get through at all
            if not job.alive:
                if missing is not None:
                    self._say(f"the end of the log is missing: {missing}")
                return job
            self._pause()

    def stop(self) -> None:
        """Ask the job to stop; it has ``jobs.STOP_SECONDS`` for that. No harm if it has ended."""
        while not self._patiently(lambda: self._jobs.stop(self._name)) and self.look().alive:
            self._pause()  # Ray knows the job before it knows whom to ask

    def wait(self) -> Job:
        """Wait until the job has ended; returns how it ended."""
        while (job := self.look()).alive:
            self._pause()
        return job

    def look(self) -> Job:
        """The job as it is now."""
        try:
            return self._patiently(lambda: self._jobs.find(self._name))
        except InputError as error:
            what = "the cluster has forgotten it, as a head does that was started again"
            raise RaymeldError(what, f"job {self._name}", "Submit the merge again.") from error

    def _patiently(self, ask: Callable[[], Answer], seconds: float = PATIENCE_SECONDS) -> Answer:
        """The answer to ``ask``, asked again while the cluster gives none, for ``seconds``."""
        deadline = time.monotonic() + seconds
        told = False
        while True:
            try:
                return ask()
            except NoAnswerError as error:
                if time.monotonic() > deadline:
                    what = f"no answer for {seconds:g} s, though the job may go on"
                    remedy = f"Come back with: raymeld jobs logs --follow {self._name}"
                    raise RaymeldError(f"{what}: {error.what}", error.where, remedy) from error
                if not told:
                    self._say(f"no answer from the cluster; trying again: {error.what}")
                    told = True
            self._pause()

    def _pause(self) -> None:
        self._heed()
        time.sleep(POLL_SECONDS)
        self._heed()

    def _read(self, stream: _Stream, write: Callable[[str], Any]) -> None:
        """Write what ``stream`` brings, until it ends, or is too quiet, or the job has ended."""
        position, heard = 0, time.monotonic()
        while time.monotonic() - heard < QUIET_SECONDS:
            self._heed()
            try:
                piece = stream.pieces.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self.look().alive:
                    return
                continue
            if piece is None:
                return
            self._write_from(position, piece, write)
            position, heard = position + len(piece), time.monotonic()

    def _write_from(self, position: int, piece: str, write: Callable[[str], Any]) -> None:
        """Write the part of ``piece``, which starts at ``position``, that was not written yet."""
        new = piece[max(0, self._seen - position) :]
        self._seen += len(new)
        write(new)

    def _catch_up(self, write: Callable[[str], Any]) -> RaymeldError | None:
        """Write what the log holds by now, fetched in one go; returns why it could not be."""
        try:
            log = self._patiently(lambda: self._jobs.log(self._name), LOG_SECONDS)
        except RaymeldError as error:
            return error
        self._write_from(0, log, write)
        return None


class _Stream:
    """One connection that brings the log, read in a thread.

    Ray's reader is a coroutine, and what waits for it here has other things to look at.
    """

    def __init__(self, source: AsyncIterator[str]) -> None:
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Of the log; None follows the last, whether the stream has ended or broken."""
        import asyncio  # 20 ms that other commands need not wait for

        self._loop = asyncio.new_event_loop()
        self._reading = self._loop.create_task(self._read(source))
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """End the connection; what was not read yet is gone."""
        with contextlib.suppress(RuntimeError):  # the loop has closed itself: the stream had ended
            self._loop.call_soon_threadsafe(self._reading.cancel)

    async def _read(self, source: AsyncIterator[str]) -> None:
        try:
            async for piece in source:
                self.pieces.put(piece)
        except Exception:  # noqa: BLE001, S110 - it ends; whoever reads opens another
            pass
        finally:
            self.pieces.put(None)

    def _run(self) -> None:
        from asyncio import CancelledError

        with contextlib.suppress(CancelledError):
            self._loop.run_until_complete(self._reading)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
