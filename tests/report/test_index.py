"""The page of all figures."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from report.index import write_index


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(base64.b64decode(dict(attributes)["src"].partition("base64,")[2]).decode())

    def handle_data(self, data):
        self.text += data


def test_page_shows_every_figure_and_table_once(tmp_path):
    for section in ("b <2>", "a"):
        (tmp_path / section).mkdir()
        (tmp_path / section / "one.png").write_bytes(f"{section}/one".encode())
    (tmp_path / "a" / "two.png").write_bytes(b"a/two")
    (tmp_path / "a" / "table.md").write_text(
        "# Title\n\n| x | y |\n|---|---|\n| 1 | α < β |\n\n![figure](one.png)\n*α < β*\n"
    )
    (tmp_path / "empty").mkdir()
    page = Page(write_index(tmp_path).read_text())
    assert page.images == ["a/one", "a/two", "b <2>/one"]
    assert page.tags.count("table") == 1
    assert page.tags.count("section") == 2
    assert "α < β" in page.text


def test_nothing_to_show(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="make figures"):
            write_index(folder)
