"""What is wrong with the node_config of a cluster file: asked of the clouds' own descriptions."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

import botocore.session
import jsonschema
from botocore.model import ListShape, Shape, StringShape, StructureShape
from botocore.validate import ParamValidator

GCP_INTEGERS = {"int64", "uint64"}  # strings in JSON, but numbers are taken too


def aws_problems(node_config: dict[str, Any]) -> list[str]:
    """What EC2's RunInstances would refuse: unknown or ill-typed parameters, unknown values."""
    shape = _run_instances()
    request = {**node_config, "MinCount": 1, "MaxCount": 1}  # Ray adds them
    report = ParamValidator().validate(request, shape)
    return [*filter(None, report.generate_report().splitlines()), *_unlisted(request, shape, "")]


@functools.cache
def _run_instances() -> StructureShape:
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    assert isinstance(shape, StructureShape)
    return shape


def _unlisted(value: Any, shape: Shape, where: str) -> Iterator[str]:
    """Values that an enumeration does not have: botocore leaves those to the service."""
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        for name in value.keys() & shape.members.keys():
            yield from _unlisted(value[name], shape.members[name], f"{where}.{name}")
    elif isinstance(shape, ListShape) and isinstance(value, list):
        for item in value:
            yield from _unlisted(item, shape.member, where)
    elif isinstance(shape, StringShape) and shape.enum and value not in shape.enum:
        yield f"{where}: EC2 knows no {value!r}"


def gcp_problems(node_config: dict[str, Any]) -> list[str]:
    """What does not fit Compute Engine's Instance, as its discovery document describes it."""
    schema = {"$ref": "#/$defs/Instance", "$defs": _compute_schemas()}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(node_config)
    return [f"{error.json_path}: {error.message}" for error in errors]


@functools.cache
def _compute_schemas() -> dict[str, Any]:
    documents = importlib.resources.files("googleapiclient.discovery_cache.documents")
    described = json.loads(documents.joinpath("compute.v1.json").read_text())["schemas"]
    return {name: _strict(kind) for name, kind in described.items()}


def _strict(kind: dict[str, Any]) -> dict[str, Any]:
    """A type of the discovery document as a JSON Schema that refuses unknown fields."""
    if "$ref" in kind:
        return {"$ref": f"#/$defs/{kind['$ref']}"}
    if kind.get("format") in GCP_INTEGERS:
        return {"type": ["string", "integer"]}
    schema: dict[str, Any] = {"type": kind["type"]} if kind.get("type") != "any" else {}
    if "enum" in kind:
        schema["enum"] = kind["enum"]
    if "items" in kind:
        schema["items"] = _strict(kind["items"])
    if kind.get("type") == "object":
        properties = kind.get("properties", {})
        others = kind.get("additionalProperties")
        schema["properties"] = {name: _strict(field) for name, field in properties.items()}
        schema["additionalProperties"] = _strict(others) if others else False
    return schema
