"""The filters of the list of jobs: in the page's URL, in its form, and as the inspection API wants them. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

FIELDS = ("status", "kind", "model", "session", "tenant", "code", "worker", "since", "until")
COUNTED = ("kind", "model", "tenant", "since", "until")  # filters that the quick filters' numbers heed
PERIODS = {"15m": "the last 15 minutes", "1h": "the last hour", "24h": "the last day"}
_PAIR = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_INSTANT = re.compile(r"[0-9]{1,15}")  # ms
_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True, slots=True)
class Filters:
    """What the URL of the page asks for."""

    fields: Mapping[str, str]  # of FIELDS, as they were written; `since` may be an age, such as `15m`
    metadata: Mapping[str, str]

    @classmethod
    def parse(cls, items: Iterable[tuple[str, str]]) -> Filters:
        """Of a query or a form. What it does not know, and fields that were left empty, mean nothing."""
        fields: dict[str, str] = {}
        metadata: dict[str, str] = {}
        key = value = ""
        for name, text in items:
            if pair := _PAIR.fullmatch(name):
                metadata[pair[1]] = text
            elif name == "metadata_key":
                key = text.strip()
            elif name == "metadata_value":
                value = text
            elif name in FIELDS and text.strip():
                fields[name] = text.strip()
        if key:
            metadata[key] = value
        return cls(fields, metadata)

    def items(self) -> list[tuple[str, str]]:
        """As a URL of the page has them."""
        return [*self.fields.items(), *((f"metadata[{key}]", value) for key, value in self.metadata.items())]

    def query(self, now_ms: int) -> dict[str, str]:
        """As `GET /v1/jobs` wants them."""
        return dict(self.items()) | self._since(now_ms)

    def counted(self, now_ms: int) -> dict[str, str]:
        """As `GET /v1/jobs/counts` wants them, without what its numbers tell apart."""
        return {name: value for name, value in self.query(now_ms).items() if name in COUNTED}

    def chosen(self, now_ms: int) -> dict[str, Any]:
        """As the bulk actions want them."""
        fields: dict[str, Any] = {**self.fields, **self._since(now_ms)}
        for name in ("since", "until"):
            if _INSTANT.fullmatch(str(fields.get(name, ""))):  # the bulk actions say what is wrong with anything else
                fields[name] = int(fields[name])
        return fields | {"metadata": dict(self.metadata)}

    def _since(self, now_ms: int) -> dict[str, str]:
        age = _AGE.fullmatch(self.fields.get("since", ""))
        return {"since": str(now_ms - int(age[1]) * _UNITS_MS[age[2]])} if age else {}

    def with_(self, **changes: str | None) -> Filters:
        """The same with other fields; None takes one away."""
        fields = {**self.fields, **changes}
        return Filters({name: text for name, text in fields.items() if text is not None}, self.metadata)

    def url(self, **more: str) -> str:
        """The page of these jobs."""
        query = urlencode([*self.items(), *more.items()])
        return f"/dashboard/jobs?{query}" if query else "/dashboard/jobs"

    @property
    def are_counted(self) -> bool:
        """Whether the quick filters' numbers heed all that was asked for."""
        return not self.metadata and not {"session", "worker"} & set(self.fields)
