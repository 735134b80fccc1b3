"""The OpenAPI document as tests use it: its schemas, and what an answer is checked against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema

from api.openapi.document import openapi_document
from api.openapi.requests import request_schemas


@cache
def closed_document() -> dict[str, Any]:
    """The document, with every object of an answer closed: a field that it does not name is an error here.

    For clients they stay open, since a later version may say more.
    """
    document = openapi_document()
    schemas = document["components"]["schemas"]
    for name in schemas.keys() - request_schemas().keys():
        schemas[name] = _closed(schemas[name])
    return document


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def fresh_document() -> dict[str, Any]:
    """The closed document, to be changed."""
    return copy.deepcopy(closed_document())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and operation object of each."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def check(value: Any, schema: dict[str, Any] | str) -> None:
    """Raises jsonschema.ValidationError. `schema`: a schema, or the name of one of the document's."""
    document = closed_document()
    wanted = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
    jsonschema.Draft202012Validator({**wanted, "components": document["components"]}).validate(value)
