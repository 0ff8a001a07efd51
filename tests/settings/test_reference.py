"""The page of settings is generated."""

from pathlib import Path

from cluda_cli.settings.reference import reference_markdown

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference" / "settings.md"


def test_the_page_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), (
        "write it anew with: python -m cluda_cli.settings.reference > docs/reference/settings.md"
    )


def test_every_row_of_the_page_of_settings_is_one_line():
    rows = [line for line in reference_markdown().splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)
    assert len(rows) > 70
