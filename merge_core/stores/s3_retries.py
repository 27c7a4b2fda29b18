"""Which requests to S3 are sent again, and when: botocore's own budget of retries is one for all
requests of a client, so where many fail at once most of them would be tried no second time.
"""

from __future__ import annotations

from typing import Any

from botocore import exceptions

from merge_core.stores.retries import PATIENT, STUBBORN, Retries, asked_by

PASSING = frozenset({429, 500, 502, 503, 504})
"""Statuses that pass by themselves."""

PASSING_CODES = frozenset(
    {
        "InternalError",
        "PriorRequestNotComplete",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    }
)
"""Codes that do, whatever the status: S3 says RequestTimeout, and its key service
ThrottlingException, with 400."""

NO_ANSWER = (exceptions.ConnectionError, exceptions.HTTPClientError)
"""What botocore raises where none came, or broke off."""

COPYING = Retries(attempts=3)
"""Of a part that S3 copies within itself: what it would save can be sent instead."""


def passes(status: int, code: str) -> bool:
    """Whether an answer is one that passes by itself."""
    return status in PASSING or code in PASSING_CODES


class Persistence:
    """Decides that for one client. Its requests share nothing but whether S3 has ever answered: an
    address that never did is perhaps wrong, which should be said soon.
    """

    def __init__(self) -> None:
        self._answered = False

    def pause(
        self, *, attempts: int, operation: Any, response: Any, caught_exception: Any, **_: Any
    ) -> float | None:
        """A handler of botocore's event ``needs-retry``.

        Args:
            attempts: how often the request was sent.
            response: the answer and what was read in it, or None.

        Returns:
            Seconds until the request is sent again; None: not at all.
        """
        self._answered |= response is not None
        if response is None:
            passing, asked = isinstance(caught_exception, NO_ANSWER), 0.0
        else:
            answer, parsed = response
            code = str(parsed.get("Error", {}).get("Code", ""))
            passing, asked = passes(answer.status_code, code), asked_by(answer.headers)
        retries = self._retries(operation.name)
        return retries.seconds(attempts, asked) if passing and attempts < retries.attempts else None

    def _retries(self, operation: str) -> Retries:
        if operation == "UploadPartCopy":
            return COPYING
        return STUBBORN if self._answered else PATIENT
