"""Which modules an adapter's config says were trained: ``target_modules`` and what narrows it down.

As in PEFT (``tuners_utils.check_target_module_exists``): one regex for whole paths, or a list of
ends of paths, of which ``layers_to_transform`` leaves some layers and ``exclude_modules`` takes out
others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.config_values import are_names, is_regex, whole

_NUMBERS = re.compile(r"\.(\d+)\.")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The modules that were trained."""

    names: str | tuple[str, ...] = ()
    """A regex, or ends of paths."""
    excluded: str | tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    """Numbers of the layers that ends of paths are looked for in; None: in all of them."""
    patterns: tuple[re.Pattern[str], ...] = (_ANY_LAYER,)
    """What finds the number of a layer in a path, as its last group."""
    unread: str | None = None
    """The field that cannot be followed; then no module is known to be a target."""

    def covers(self, module: str) -> bool:
        """Whether ``module`` is known to be a target."""
        if self.unread is not None or _is_named(module, self.excluded):
            return False
        if not _is_named(module, self.names):
            return False
        by_its_end = not isinstance(self.names, str) and module not in self.names
        return self.layers is None or not by_its_end or self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        """Experts have two numbers, of which older releases of PEFT took the last for the layer's:
        of them nothing is known.
        """
        if len(_NUMBERS.findall(module)) > 1:
            return False
        tries = (pattern.match(module) for pattern in self.patterns)
        found = next((match for match in tries if match), None)
        return found is not None and int(found[found.re.groups]) in (self.layers or ())


def read_targets(fields: Mapping[str, Any]) -> Targets:
    """What the config says; ``unread`` names a field that is malformed, or slow to match."""
    given = [fields.get(name) for name in _FIELDS]
    targets, excluded, layers, names = (() if value is None else value for value in given)
    layers = [layers] if type(layers) is int else layers
    patterns = _patterns([names] if isinstance(names, str) and names else names or ())
    checks = (
        ("target_modules", targets != "all-linear" and _are_names(targets)),
        ("exclude_modules", _are_names(excluded)),
        ("layers_to_transform", _are_numbers(layers)),
        ("layers_pattern", patterns is not None),
    )
    unread = next((name for name, is_read in checks if not is_read), None)
    if unread is not None:
        return Targets(unread=unread)
    return Targets(
        names=targets if isinstance(targets, str) else tuple(targets),
        excluded=excluded if isinstance(excluded, str) else tuple(excluded),
        layers=frozenset(layers) if layers else None,
        patterns=patterns or (_ANY_LAYER,),
    )


def _is_named(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return whole(names).match(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _are_names(value: Any) -> bool:
    if not isinstance(value, str):
        return are_names(value)
    return is_regex(value) and _compiles(value)


def _compiles(pattern: str) -> bool:
    """By itself: a reference to a group may have one only within another pattern."""
    try:
        whole(pattern)
    except re.error:
        return False
    return True


def _patterns(names: Any) -> tuple[re.Pattern[str], ...] | None:
    """PEFT's for layers of these names; None if there are no such patterns."""
    if not are_names(names) or not all(map(is_regex, names)):
        return None
    try:
        return tuple(re.compile(rf"(?:^|.*?\.){name}\.(\d+)\.") for name in names)
    except re.error:
        return None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is int for one in value)
