"""Ray's tokens: which mode to connect in, having Ray look again, and leaving all as it was."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - where it lies, not what it is
"""Where Ray keeps the token of this user."""

HOST_AND_PORT = re.compile(r"(?P<host>[^/:]+):(?P<port>\d+)")
"""Unlike ``auto`` and ``ray://``, which Ray resolves."""

_PROBE = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"
"""In a process of its own: Ray's C++ part prints the refusal, and reads the mode only once."""


@contextlib.contextmanager
def borrowed_environment() -> Iterator[None]:
    """Put the environment back at the end; importing Ray is enough to change it.

    Ray's view of it is put back as well: the next who connects shows the token of the caller.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        reload_authentication()


def choose_authentication(address: str) -> None:
    """Send the token only to a cluster that asks for one.

    Ray sends it to an explicit address only when it is told to, and in a cluster that knows no
    tokens the workers of a driver that sends one die.
    """
    if "RAY_AUTH_MODE" in os.environ or not _has_token():
        return
    if HOST_AND_PORT.fullmatch(address) is None:
        use_token_if_there_is_one()
        return
    asked = subprocess.run(
        [sys.executable, "-c", _PROBE, address],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    os.environ["RAY_AUTH_MODE"] = "token" if asked.returncode else "disabled"


def use_token_if_there_is_one() -> bool:
    """Have Ray send the token to an explicit address, which it does only when it is told to.

    Returns:
        Whether a token will be sent, or RAY_AUTH_MODE has decided that already: False means that
        only a cluster that is open to everybody will take this process.
    """
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    return "RAY_AUTH_MODE" in os.environ


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path(TOKEN_FILE).expanduser().exists()


def reload_authentication() -> None:
    """Have Ray read RAY_AUTH_MODE and the token again: it does so only once, when it is imported.

    Ray's own command line calls the same two functions; there is no public one.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
