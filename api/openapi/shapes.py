"""JSON schemas, in few words. No I/O.

An object has all of its fields unless it says otherwise. More fields may come with a later version, so that no object
is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "description": "Seconds since the epoch."}
INSTANT_MS: Schema = {"type": "integer", "description": "Milliseconds since the epoch."}
DURATION_MS: Schema = {"type": "integer", "minimum": 0, "description": "Milliseconds."}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def said(schema: Schema, description: str) -> Schema:
    """The same, with a sentence."""
    return schema | {"description": description}


def const(value: str) -> Schema:
    return {"type": "string", "const": value}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def map_of(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    if "type" in schema and "enum" not in schema and "const" not in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def obj(fields: Mapping[str, Schema], *, optional: Sequence[str] = (), description: str = "") -> Schema:
    """An object with these fields. Those in `optional` may be missing."""
    schema: Schema = {"type": "object", "properties": dict(fields)}
    if required := [name for name in fields if name not in optional]:
        schema["required"] = required
    return said(schema, description) if description else schema


def page_of(items: Schema, description: str) -> Schema:
    """A page as OpenAI's lists have it."""
    return obj(
        {
            "object": const("list"),
            "data": array(items),
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
            "has_more": BOOLEAN,
        },
        description=description,
    )


def deleted(kind: str) -> Schema:
    return obj({"id": STRING, "object": const(kind), "deleted": {"type": "boolean", "const": True}})
