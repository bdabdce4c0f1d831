"""One page of all tables and figures: ``python -m report.index FOLDER`` writes FOLDER/index.html.

Every subfolder that holds figures (``*.png``) or tables (``*.md``) becomes a section; ``make figures`` fills them.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from experiment.command_line import command
from report.page import figure, to_html, write_page


def write_index(folder: str | Path, /) -> Path:
    """Write the page; return its path.

    Raises:
        ValueError: no subfolder holds a figure or a table.
    """
    sections: dict[str, str] = {}
    for child in sorted(path for path in Path(folder).glob("*") if path.is_dir()):
        texts = [path.read_text() for path in sorted(child.glob("*.md"))]
        shown = {name for text in texts for name in re.findall(r"^!\[.*?\]\((.*?)\)", text, re.MULTILINE)}
        for path in sorted(child.glob("*.png")):
            if path.name not in shown:
                texts.append(figure(path.name, path.stem, path.stem.replace("_", " ")))
        if texts:
            sections[html.escape(child.name)] = "".join(to_html(text, child) for text in texts)
    if not sections:
        raise ValueError(f"{folder}: no subfolder holds figures or tables; `make figures` makes them")
    links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in sections)
    body = "".join(f'<section id="{name}"><h1>{name}</h1>{text}</section>' for name, text in sections.items())
    return write_page(Path(folder) / "index.html", "Figures and tables", f"<ul>{links}</ul>{body}")


if __name__ == "__main__":
    command(write_index)
