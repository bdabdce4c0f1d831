"""One page of all tables and figures: ``python -m report.index FOLDER`` writes FOLDER/index.html.

Every subfolder that holds figures (``*.png``) or tables (``*.md``) becomes a section; ``make figures`` fills them.
"""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path

import markdown

from experiment.files import write_atomically

__all__ = ["write_index"]

_STYLE = """
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.4; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
"""


def write_index(folder: Path) -> Path:
    """Write the page; return its path.

    Raises:
        ValueError: no subfolder holds a figure or a table.
    """
    sections = {
        child: (sorted(child.glob("*.md")), sorted(child.glob("*.png")))
        for child in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if child.is_dir()
    }
    sections = {child: files for child, files in sections.items() if any(files)}
    if not sections:
        raise ValueError(f"{folder}: no subfolder holds figures or tables; `make figures` makes them")
    parts = ["<ul>"]
    parts += [f'<li><a href="#{html.escape(child.name)}">{html.escape(child.name)}</a></li>' for child in sections]
    parts.append("</ul>")
    for child, (tables, figures) in sections.items():
        name = html.escape(child.name)
        parts.append(f'<section id="{name}"><h1>{name}</h1>')
        parts += [_table(table) for table in tables]
        for figure in figures:
            source = html.escape(f"{child.name}/{figure.name}")
            caption = html.escape(figure.stem.replace("_", " "))
            parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        parts.append("</section>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Figures and tables</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _table(path: Path) -> str:
    # The figures follow anyway, so that those which a report shows are not repeated.
    lines = [line for line in path.read_text().splitlines() if not line.startswith("![")]
    return markdown.markdown("\n".join(lines), extensions=["tables"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print(write_index(parser.parse_args().folder))
    except ValueError as error:
        sys.exit(f"error: {error}")
