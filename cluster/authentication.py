"""Ray's tokens: which mode to connect in, and having Ray look again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HOST_AND_PORT = re.compile(r"(?P<host>[^/:]+):(?P<port>\d+)")
"""Unlike ``auto`` and ``ray://``, which Ray resolves."""

_PROBE = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"
"""In a process of its own: Ray's C++ part prints the refusal, and reads the mode only once."""


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


def use_token_if_there_is_one() -> None:
    """Ray sends the token to an explicit address only when it is told to."""
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().exists()


def reload_authentication() -> None:
    """Have Ray read RAY_AUTH_MODE and the token again: it does so only once, when it is imported.

    Ray's own command line calls the same two functions; there is no public one.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
