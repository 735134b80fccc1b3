"""docs/settings.md says what the settings are."""

from __future__ import annotations

from cli.settings_table import settings_table
from shared.settings import Settings
from tests.processes import ROOT


def test_the_document_is_up_to_date() -> None:
    document = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert document == settings_table(), "run: python -m cli.settings_table > docs/settings.md"


def test_every_setting_is_explained() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
