"""Which versions of its libraries raymeld asks for, and finds."""

from __future__ import annotations

import pytest

from actors.libraries import Library, find_libraries


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        (">=0.20", "0.21.2", True),
        (">=0.20", "0.9.0", False),
        (">=2.9", "2.13.0+cpu", True),
        (">=2.60,<2.61", "2.61.0", False),
        (">=1", "2.0rc1", True),
        ("", "1", True),
        ("", None, False),
    ],
)
def test_a_library_fits_if_its_version_is_asked_for(
    wanted: str, found: str | None, fits: bool
) -> None:
    assert Library(name="x", wanted=wanted, found=found).fits is fits


def test_what_raymeld_asks_for_is_installed_here() -> None:
    libraries = find_libraries()

    assert {"torch", "ray", "peft", "xxhash"} <= {library.name for library in libraries}
    assert [library for library in libraries if not library.fits] == []
