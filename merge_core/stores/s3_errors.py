"""What S3 and botocore say when something fails, as an error that helps.

Signed headers, and URLs with what they ask for, stay out of it.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from botocore import exceptions
from urllib3.exceptions import HTTPError

from merge_core.errors import RaymeldError, StorageError, replaced
from merge_core.stores.failures import absent
from merge_core.stores.location import Location

ABSENT = frozenset(("404", "NoSuchKey"))
TAKEN = frozenset(("412", "PreconditionFailed"))
"""Codes of a condition that does not hold: If-Match or If-None-Match."""
_CONDITIONAL = frozenset(("GetObject", "PutObject", "CompleteMultipartUpload", "UploadPartCopy"))
"""What is asked with one; a server may answer so to others for reasons of its own."""
CONFLICT = frozenset(("409", "ConditionalRequestConflict", "OperationAborted"))
"""Codes of another writer in the same moment."""
GONE = frozenset(("404", "NoSuchUpload", "NoSuchKey"))
"""Codes of a multipart upload that was completed or aborted."""

BROKEN = (exceptions.HTTPClientError, exceptions.IncompleteReadError, HTTPError, OSError)
"""What reading a body raises when the connection breaks or stalls."""

_RIGHTS = "Check that these credentials may list, read and write there"
_KEYS = (
    "Check AWS_PROFILE or AWS_ACCESS_KEY_ID with its secret and token (aws sts get-caller-identity)"
)
_REGION = "Give the bucket's own region, by --region or AWS_REGION"
_LATER = "The same command again goes on where it stopped"

_ANSWERS: Mapping[tuple[str, ...], tuple[str, str]] = MappingProxyType(
    {
        ("NoSuchBucket",): ("there is no such bucket", "Check its name, and the endpoint's URL"),
        ("403", "AccessDenied", "AllAccessDisabled", "AccountProblem"): (
            "access is denied",
            f"{_RIGHTS}; without s3:ListBucket what does not exist is denied too",
        ),
        ("InvalidAccessKeyId",): ("the server does not know this access key", _KEYS),
        ("SignatureDoesNotMatch",): ("the secret key does not fit the access key", _KEYS),
        ("ExpiredToken", "TokenRefreshRequired"): (
            "the credentials have expired",
            "Log in again, or have them renewed by a role or a profile",
        ),
        ("InvalidToken",): ("the session token is not valid", _KEYS),
        ("RequestTimeTooSkewed", "RequestExpired"): (
            "this machine's clock is wrong, so its signatures are not accepted",
            "Set the clock (chronyc tracking, timedatectl)",
        ),
        (
            "301",
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
        ): ("the bucket is in another region", _REGION),
        ("InvalidBucketName",): ("the server takes no bucket of that name", "Check its name"),
        ("InvalidObjectState",): (
            "the object is archived and cannot be read",
            "Restore it (aws s3api restore-object), or copy it to another storage class",
        ),
        ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"): (
            "what arrived at the server is not what was sent",
            "Something between here and there changes data; " + _LATER,
        ),
        ("507", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"): (
            "the store is full",
            "Free space there, or choose another --out",
        ),
        ("501", "NotImplemented"): (
            "the server lacks something that S3 has",
            "It must know If-None-Match, multipart uploads and ranges",
        ),
        (
            "503",
            "429",
            "SlowDown",
            "ServiceUnavailable",
            "500",
            "InternalError",
            "RequestTimeout",
        ): (
            "the server failed however often it was asked",
            _LATER,
        ),
        tuple(CONFLICT): ("another process was writing the same object", _LATER),
    }
)
_BY_CODE = {code: said for codes, said in _ANSWERS.items() for code in codes}

_FAILURES: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    (
        (exceptions.NoCredentialsError,),
        "no credentials were found",
        "Set AWS_PROFILE or AWS_ACCESS_KEY_ID, give the machine a role, or read with --anonymous",
    ),
    (
        (
            exceptions.PartialCredentialsError,
            exceptions.ProfileNotFound,
            exceptions.ConfigParseError,
        ),
        "the credentials are incomplete",
        "Check ~/.aws/config, ~/.aws/credentials and the AWS_ variables",
    ),
    (
        (
            exceptions.CredentialRetrievalError,
            exceptions.TokenRetrievalError,
            exceptions.NoAuthTokenError,
            exceptions.SSOError,
            exceptions.MetadataRetrievalError,
        ),
        "the credentials could not be fetched",
        "Log in again (aws sso login)",
    ),
    (
        (exceptions.SSLError,),
        "no TLS connection could be made",
        "Check the endpoint's URL and its certificate (AWS_CA_BUNDLE)",
    ),
    (
        (exceptions.ConnectionError,),
        "the server cannot be reached",
        "Check the endpoint's URL, the region and the network",
    ),
    (BROKEN, "the connection broke or stalled however often it was tried", _LATER),
)
"""The first that fits; ConnectionError is the parent of SSLError."""


def code_of(error: Exception) -> str:
    """The error code of an answer of S3; empty for anything else."""
    return str(_answer_in(error).get("Error", {}).get("Code", ""))


def status_of(error: Exception) -> int:
    """The status of an answer of S3; 0 for anything else."""
    return int(_answer_in(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer_in(error: Exception) -> Any:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


@contextlib.contextmanager
def reported(where: Location) -> Iterator[None]:
    """Turn what botocore and urllib3 raise inside into a StorageError about ``where``.

    Raises:
        AbsentError: there is no such object.
        StorageError: anything else.
    """
    try:
        yield
    except RaymeldError:
        raise
    except exceptions.ClientError as error:
        raise _of_answer(error, where) from error
    except (exceptions.BotoCoreError, HTTPError, OSError) as error:
        raise _of_failure(error, where) from error


def _of_answer(error: Any, where: Location) -> StorageError:
    code = code_of(error)
    if code in ABSENT:
        return absent(where)
    if code in TAKEN and error.operation_name in _CONDITIONAL:
        return replaced(where)
    message = reprlib.repr(error.response["Error"].get("Message", ""))
    what, remedy = _BY_CODE.get(code, (f"S3 answers {code}: {message}", _RIGHTS))
    return StorageError(what, str(where), f"{remedy}.")


def _of_failure(error: Exception, where: Location) -> StorageError:
    for kinds, what, remedy in _FAILURES:
        if isinstance(error, kinds):
            return StorageError(what, str(where), f"{remedy}.")
    said = f"S3 cannot be used: {type(error).__name__}: {reprlib.repr(str(error))}"
    return StorageError(said, str(where), "Check the endpoint, the region and ~/.aws.")
