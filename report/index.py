"""One page of all tables and figures: ``python -m report.index FOLDER`` writes FOLDER/index.html.

Every subfolder that holds figures (``*.png``) or tables (``*.md``) becomes a section; ``make figures`` fills them.
"""

from __future__ import annotations

import html
from pathlib import Path

import markdown

from experiment.command_line import command
from experiment.files import write_text

_STYLE = """
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.4; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
"""


def write_index(folder: str | Path, /) -> Path:
    """Write the page; return its path.

    Raises:
        ValueError: no subfolder holds a figure or a table.
    """
    sections: dict[str, str] = {}
    for child in sorted(path for path in Path(folder).glob("*") if path.is_dir()):
        parts = [_table(path) for path in sorted(child.glob("*.md"))]
        parts += [_figure(path) for path in sorted(child.glob("*.png"))]
        if parts:
            sections[html.escape(child.name)] = "".join(parts)
    if not sections:
        raise ValueError(f"{folder}: no subfolder holds figures or tables; `make figures` makes them")
    links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in sections)
    body = "".join(f'<section id="{name}"><h1>{name}</h1>{text}</section>' for name, text in sections.items())
    path = Path(folder) / "index.html"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Figures and tables</title>'
        f"<style>{_STYLE}</style></head><body><ul>{links}</ul>{body}</body></html>\n"
    )
    write_text(path, page)
    return path


def _table(path: Path) -> str:
    # The figures follow anyway, so that those which a report shows are not repeated.
    lines = [line for line in path.read_text().splitlines() if not line.startswith("![")]
    return markdown.markdown("\n".join(lines), extensions=["tables"])


def _figure(path: Path) -> str:
    source, caption = html.escape(f"{path.parent.name}/{path.name}"), html.escape(path.stem.replace("_", " "))
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


if __name__ == "__main__":
    command(write_index)
