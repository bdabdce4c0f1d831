"""From Markdown to one HTML file with all figures inside, which a phone shows as well as a desk."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import markdown

from experiment.files import write_text

_STYLE = """
body { font: 1rem/1.45 sans-serif; max-width: 60rem; margin: 0 auto; padding: 0.5rem 1rem; color: #111; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; white-space: nowrap; }
td, th { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: #333; }
code { overflow-wrap: anywhere; }
"""


def figure(path: str, title: str, caption: str) -> str:
    """Of a figure, the Markdown that ``write_page`` makes a figure with its caption of."""
    return f"![{title}]({path})\n*{caption}*"


def to_html(text: str, folder: Path) -> str:
    """Markdown as HTML; the figures, PNGs whose paths begin in ``folder``, are part of it."""

    def embedded(match: re.Match) -> str:
        title, source, caption = match[1], html.unescape(match[2]), match[3]
        data = base64.b64encode((folder / source).read_bytes()).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    found = markdown.markdown(text, extensions=["tables", "sane_lists"])
    found = re.sub(r'<p><img alt="(.*?)" src="(.*?)" />\s*<em>(.*?)</em></p>', embedded, found, flags=re.DOTALL)
    return found.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def write_page(path: Path, title: str, body: str) -> Path:
    """Write a page whose body is HTML; return its path."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')
    return path
