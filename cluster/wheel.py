"""This raymeld as a wheel, put together from the files that it runs from.

That is the same for a checkout and for an installed raymeld, and needs neither a network nor a
build. Two things are not as in a published wheel, because of what Ray does with the wheels of a
job:

- It takes a wheel for one that the cluster has already when the file names are equal. So the name
  holds a digest of the content, as the wheel's build tag.
- It installs a wheel into a directory of its own with everything that the wheel depends on, which
  would bring another torch to every node. So the wheel depends on nothing: a node that can run
  raymeld has it all.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zipfile
from pathlib import Path

from actors.identity import PACKAGES
from merge_core import __version__
from merge_core.errors import RaymeldError

PYTHON = ">=3.11"
"""What pip on a node compares its Python with."""

_TAG = "py3-none-any"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The first time that a zip file can hold: times would make equal wheels differ."""


def assemble_wheel(directory: Path) -> Path:
    """Write the wheel into ``directory`` and return its path.

    The same files give the same bytes and the same name, on any machine.

    Raises:
        RaymeldError: the packages are not in directories, so that their files cannot be read.
        OSError: a file cannot be read, or the wheel not written.
    """
    files = _package_files()
    build = f"0{_digest(files)[:16]}"  # a build tag starts with a digit
    info = f"raymeld-{__version__}.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: raymeld\nVersion: {__version__}\nRequires-Python: {PYTHON}\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: raymeld {__version__}\nRoot-Is-Purelib: true\n"
        f"Tag: {_TAG}\nBuild: {build}\n"
    ).encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    path = directory / f"raymeld-{__version__}-{build}-{_TAG}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix: rw-r--r--
            wheel.writestr(entry, content)  # stored: compressors differ from machine to machine
    return path


def _package_files() -> dict[str, bytes]:
    """The content of every file of the packages, by its path in the wheel."""
    files = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent if spec is not None and spec.origin else None
        if root is None or not root.is_dir():
            what = f"cannot be packed: {package!r} is in no directory"
            raise RaymeldError(what, "raymeld", "Install it with pip, or run it from a checkout.")
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            if path.is_file() and not any(p == "__pycache__" or p[0] == "." for p in parts):
                files["/".join((package, *parts))] = path.read_bytes()
    return files


def _digest(files: dict[str, bytes]) -> str:
    state = hashlib.sha256(__version__.encode())
    for name, content in files.items():
        state.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return state.hexdigest()


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    """The list of files that installers check, as the wheel format wants it."""
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{own_name},,\n"]).encode()
