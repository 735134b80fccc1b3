"""docs/settings.md, made from the settings themselves: `python -m cli.settings_table > docs/settings.md`."""

from __future__ import annotations

import click
from pydantic.fields import FieldInfo

from cli.environment import variable
from shared.settings import Settings

_HEAD = """\
# Settings

Every process reads these variables once, when it starts. Durations (`_S`) are seconds, sizes (`_BYTES`) are bytes.
A wrong value ends `endmark` with exit code 2 and a message that names the variable. `endmark dev`, `endmark api` and
`endmark worker` take some as options, which win over the variables. [Commands](commands.md) has the variables of the
commands that look into a running deployment.

<!-- Made by `python -m cli.settings_table > docs/settings.md`; a test compares. -->

| Variable | Default | Meaning |
|---|---|---|
"""


def settings_table() -> str:
    """The whole of docs/settings.md."""
    return _HEAD + "".join(
        f"| `{variable(name)}` | {_default(field)} | {_cell(field.description)} |\n"
        for name, field in Settings.model_fields.items()
    )


def _default(field: FieldInfo) -> str:
    return f"`{field.default}`" if field.default not in ("", ()) else "(empty)"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", r"\|")


if __name__ == "__main__":
    click.echo(settings_table(), nl=False)
