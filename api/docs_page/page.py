"""The OpenAPI document as a page. Made once, at the start; whatever it is made from is part of the package.

Rule 1: the page needs nothing but itself: no script, no font, no request to anywhere.
Rule 2: it shows what the document says, and knows nothing of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape


class Page(NamedTuple):
    """What a browser gets."""

    html: str
    content_security_policy: str  # allows the page's own style sheet, and nothing else


def docs_page(document: dict[str, Any]) -> Page:
    style = _file("page.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= {"type_of": type_of, "curl": curl, "prose": _prose}
    html = environment.from_string(_file("page.html")).render(document=document, style=Markup(style))  # noqa: S704  # our own file
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return Page(
        html,
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _prose(text: str) -> Markup:
    """Text in which `this` is code."""
    parts = text.split("`")
    shown = [Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)]
    return Markup("").join(shown)


def type_of(schema: dict[str, Any]) -> Markup:
    """A schema in one line, with links to those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return Markup(" or ").join(type_of(branch) for branch in schema[union])
    if "const" in schema:
        return Markup("<code>{}</code>").format(json.dumps(schema["const"]))
    if "enum" in schema:
        return Markup(" | ").join(Markup("<code>{}</code>").format(json.dumps(value)) for value in schema["enum"])
    kinds = schema.get("type", "anything")
    shown = [_kind(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return Markup(" or ").join(shown) + _bounds(schema)


def _kind(kind: str, schema: dict[str, Any]) -> Markup:
    if kind == "array" and "items" in schema:
        return Markup("list of ") + type_of(schema["items"])
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return Markup("map of ") + type_of(schema["additionalProperties"])
    if kind == "object" and "properties" in schema:
        return Markup("object with {}").format(", ".join(schema["properties"]))
    return escape("file" if "contentMediaType" in schema else kind)


_BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
    "maxLength": "up to {} characters",
    "minItems": "at least {}",
    "maxItems": "up to {}",
    "default": "by default {}",
}


def _bounds(schema: dict[str, Any]) -> Markup:
    said = [words.format(json.dumps(schema[name])) for name, words in _BOUNDS.items() if name in schema]
    return escape(", " + " ".join(said) if said else "")


def curl(operation: dict[str, Any], method: str, path: str) -> str:
    """The operation as a command to try."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
    command = ["curl"] if method == "get" else [f"curl -X {method.upper()}"]
    if operation["security"]:
        command.append('-H "Authorization: Bearer $OPENAI_API_KEY"')
    contents = operation.get("requestBody", {}).get("content", {})
    if "application/json" in contents:
        body = json.dumps(contents["application/json"]["example"])
        command += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(body)}"]
    elif contents:
        command += ["-F purpose=user_data", "-F file=@hello.txt"]
    return " \\\n  ".join([*command, f"http://127.0.0.1:8900{path}"])
