"""docs/options.md."""

from __future__ import annotations

from report.options import PATH, options_text


def test_the_page_has_every_field_as_the_code_has_it() -> None:
    """What ``python -m report.options`` would write is what is there."""
    assert PATH.read_text() == options_text()
