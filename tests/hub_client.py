"""huggingface_hub as it is where a test wants it: another hub, cache and token than this machine's.

It reads the environment when it is imported, so what it read is replaced.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from merge_core.stores.retries import Retries

QUICK = Retries(attempts=3, first_pause=0.0)


class HubClient:
    """What huggingface_hub goes by, until the test ends."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch = patch
        self.cache = folder / "cache"
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        self._set(
            HF_HUB_OFFLINE=False,
            HF_HUB_CACHE=str(self.cache),
            HF_TOKEN_PATH=str(folder / "token"),
            HF_HUB_DISABLE_XET=True,
            HF_XET_CACHE=str(folder / "xet"),
        )

    def use(self, address: str) -> None:
        """That hub, or a proxy before it."""
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        self._set(ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=template)

    def log_in(self, token: str) -> None:
        self._patch.setenv("HF_TOKEN", token)

    def go_offline(self) -> None:
        self._set(HF_HUB_OFFLINE=True)

    def use_xet(self) -> None:
        self._set(HF_HUB_DISABLE_XET=False)

    def wait_at_most(self, seconds: float) -> None:
        """For an answer."""
        self._set(HF_HUB_DOWNLOAD_TIMEOUT=seconds)

    def close(self) -> None:
        huggingface_hub.close_session()

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            self._patch.setattr(constants, name, value)
