"""What obstore raises, as an error that helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from obstore import exceptions

from merge_core.errors import RaymeldError, StorageError, replaced
from merge_core.stores.failures import absent
from merge_core.stores.location import Location

_DENIED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)
_LOGIN = "Log in (gcloud auth application-default login), or give the machine's account that right."


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
    except _DENIED as error:
        raise StorageError("access is denied", str(where), _LOGIN) from error
    except (exceptions.BaseError, OSError) as error:
        said = str(error).splitlines()[0]  # the rest is Rust's view of it
        remedy = "The same command again goes on where it stopped."
        raise StorageError(f"the store failed: {said}", str(where), remedy) from error
