"""What obstore raises, as an error that helps; and what it does not try again."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from obstore import exceptions

from merge_core.errors import RaymeldError, StorageError, replaced
from merge_core.stores.failures import absent
from merge_core.stores.location import Location
from merge_core.stores.retries import STUBBORN

PATIENCE_SECONDS = 120.0
"""After which a request is not repeated: obstore has tried meanwhile, with pauses of its own."""

_LOGIN = (
    "Log in (gcloud auth application-default login), or give the machine's account that right; "
    "--anonymous only reads."
)

_SIGNS = (
    ("<Code>NoSuchBucket<", "there is no such bucket", "Check its name."),
    ("<Code>AccessDenied<", "access is denied", _LOGIN),
    ("kind: Connect", "the server cannot be reached", "Check GOOGLE_BASE_URL and the network."),
)

Answer = TypeVar("Answer")


@contextlib.contextmanager
def reported(where: Location) -> Iterator[None]:
    """Turn what obstore raises inside into a StorageError about ``where``.

    Raises:
        AbsentError: there is no such object.
        StorageError: anything else.
    """
    try:
        yield
    except RaymeldError:
        raise
    except FileNotFoundError as error:
        raise absent(where) from error
    except exceptions.PreconditionError as error:
        raise replaced(where) from error
    except exceptions.UnauthenticatedError as error:
        what = "the credentials are not accepted, or no token can be had with them"
        raise StorageError(what, str(where), _LOGIN) from error
    except (exceptions.PermissionDeniedError, PermissionError) as error:
        raise StorageError("access is denied", str(where), _LOGIN) from error
    except (exceptions.BaseError, OSError) as error:
        what, remedy = _explained(str(error))
        raise StorageError(what, str(where), remedy) from error


def _explained(text: str) -> tuple[str, str]:
    """What is wrong and what to do, from the words of a list, for which obstore has no types."""
    for sign, what, remedy in _SIGNS:
        if sign in text:
            return what, remedy
    said = text.splitlines()[0].partition(": <")[0]  # the rest is XML, and Rust's view of it
    return f"the store failed: {said}", "The same command again goes on where it stopped."


def answered(request: Callable[[], Answer]) -> Answer:
    """What ``request`` returns, tried again where obstore leaves that to us: if something that is
    not the same when it is done twice was sent, and no answer came.

    Args:
        request: able to tell that it was done before.
    """
    began = time.monotonic()
    for failed in itertools.count(1):
        try:
            return request()
        except exceptions.GenericError as error:
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise
            STUBBORN.pause_after(failed, error)
    raise AssertionError("unreachable: the last attempt returns or raises")
