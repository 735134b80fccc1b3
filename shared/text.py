"""Text that survives: lone surrogates, which JSON can carry and UTF-8 cannot, pass through every hop unharmed.

A JSON string may hold half of a surrogate pair (a client that cuts its text by UTF-16 units sends one, a model that
streams them byte by byte says one). Python keeps it as a lone surrogate; strict UTF-8 refuses it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import orjson

# Of JSON that we accept. To look at many values takes long, and nobody else is served meanwhile.
MAX_CONTAINERS = 200_000  # lists and objects
MAX_VALUES = 500_000  # in all of them
MAX_COMMAS = 2_000_000  # between them: counted before it is parsed
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
MAX_DEPTH = 200  # of JSON that we accept; orjson writes up to 254 levels


def text_bytes(text: str) -> bytes:
    """UTF-8, with lone surrogates encoded as if they were characters. The inverse of `bytes_text`."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def bytes_text(data: bytes) -> str:
    """The inverse of `text_bytes`. Raises UnicodeDecodeError on bytes that it never makes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogatepass")


def json_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8; where a string holds a lone surrogate, in ASCII with escapes.

    Raises TypeError or ValueError on what JSON cannot say.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def parse_json(data: bytes) -> Any:
    """The value of a JSON document that we have written. Raises ValueError on anything else, NaN included.

    What we write holds what a client has sent, and a little around it: so here is no limit but the parser's.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:  # orjson refuses lone surrogates, the standard library reads them
            return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def parse_strangers_json(data: bytes) -> Any:
    """The same of a document that anybody may have written: ValueError also for what exceeds our limits."""
    if data.count(b",") > MAX_COMMAS and _STRING.sub(b"", data).count(b",") > MAX_COMMAS:
        raise ValueError("too many values")
    value = parse_json(data)
    _refuse_excess(value)
    return value


def _refuse_excess(value: Any) -> None:
    """What is read has to be looked at and written again: too many containers stall everybody, too deep ones fail."""
    level, containers, values = [value], 0, 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for parent in level:
            if isinstance(parent, (dict, list)):
                containers += 1
                values += len(parent)
                if containers > MAX_CONTAINERS:
                    raise ValueError("too many lists and objects")
                if values > MAX_VALUES:
                    raise ValueError("too many values")
                children = parent.values() if isinstance(parent, dict) else parent
                inner += [child for child in children if isinstance(child, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse_constant(number)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
