"""JSON Schemas of Kubernetes' and KubeRay's objects, strict: an unknown field is an error."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

KUBERAY = Path(__file__).with_name("kuberay-1.7.0.yaml")
MODULES = ("core_v1", "meta_v1")
SIMPLE = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Any": {},
    # Labels, annotations, quantities: no booleans, although YAML makes one of a bare `true`.
    "dict": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    "Quantity": {"type": ["string", "number"]},
    "IntOrString": {"type": ["string", "integer"]},
    "RawExtension": {"type": "object"},
    "Time": {"type": "string"},
    "MicroTime": {"type": "string"},
    "FieldsV1": {"type": "object"},
}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a RayJob or RayCluster; empty if nothing is."""
    validator = jsonschema.Draft202012Validator(
        {"$ref": f"#/$defs/{document['kind']}", "$defs": schemas()}
    )
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@functools.cache
def schemas() -> dict[str, Any]:
    """The schema of each type, by name."""
    found = {}
    for name, fields in yaml.safe_load(KUBERAY.read_text()).items():
        kinds = {field.rstrip("!"): _kuberay_type(kind) for field, kind in fields.items()}
        found[name] = _object(kinds, [field[:-1] for field in fields if field.endswith("!")])
    for module in MODULES:
        found |= _kubernetes_types(module)
    return found


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _kuberay_type(kind: str | list[str]) -> dict[str, Any]:
    if isinstance(kind, list):
        return {"enum": kind}
    if kind.endswith(" array"):
        return {"type": "array", "items": _kuberay_type(kind.removesuffix(" array"))}
    if kind == "map":
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if kind in {"string", "integer", "number", "boolean", "object"}:
        return {"type": kind}
    return {"$ref": f"#/$defs/{kind}"}


def _kubernetes_types(module: str) -> dict[str, Any]:
    """The dataclasses of a module of lightkube-models, read without importing their library."""
    distribution = importlib.metadata.distribution("lightkube-models")
    source = Path(str(distribution.locate_file(f"lightkube/models/{module}.py"))).read_text()
    return {
        f"{module}.{node.name}": _object(
            {name: _annotation(module, kind) for name, kind, _ in _fields(node)},
            [name for name, _, needed in _fields(node) if needed],
        )
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, bool]]:
    """Name in JSON, type, and whether it must be there."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            assert isinstance(line.annotation, ast.Constant)
            name = line.target.id
            if isinstance(line.value, ast.Call):  # a Python keyword: its JSON name is metadata
                name = ast.literal_eval(line.value.keywords[0].value)["json"]
            kind = ast.parse(line.annotation.value, mode="eval").body
            yield name, kind, line.value is None


def _annotation(module: str, kind: ast.expr) -> dict[str, Any]:
    if isinstance(kind, ast.Subscript):
        inner = _annotation(module, kind.slice)
        return inner if ast.unparse(kind.value) == "Optional" else {"type": "array", "items": inner}
    name = ast.unparse(kind)
    simple = name.rpartition(".")[2]
    if simple in SIMPLE:
        return SIMPLE[simple]
    return {"$ref": f"#/$defs/{name if '.' in name else f'{module}.{name}'}"}
