"""docs/options.md, from the defaults, ranges and meanings of all fields: ``python -m report.options``."""

from __future__ import annotations

from pathlib import Path

from configs.defaults import FIELDS
from configs.fields import options
from experiment.command_line import command
from experiment.files import write_text
from experiment.results import markdown_table

PATH = Path(__file__).parents[1] / "docs" / "options.md"


def options_text() -> str:
    """A table of every section of a config, in Markdown."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, default, allowed, meaning in options(FIELDS):
        shown = f"`{default}`" if default != "" else "empty"
        sections.setdefault(name.partition(".")[0] if "." in name else "", []).append(
            tuple(cell.replace("|", "\\|") for cell in (f"`{name}`", shown, meaning, allowed))
        )
    tables = [
        (f"## {section}\n\n" if section else "") + markdown_table(("field", "default", "what", "allowed"), rows)
        for section, rows in sections.items()
    ]
    head = (
        "# Options\n\nEvery field of a config; `--config.optim.lr=1e-4` overrides one. The defaults are NCSN++ on "
        "CIFAR-10; a config file\nhas others. Written by `python -m report.options`; what is changed here is lost.\n\n"
    )
    return head + "\n".join(tables)


def write_options() -> Path:
    """Write the page; return its path."""
    write_text(PATH, options_text())
    return PATH


if __name__ == "__main__":
    command(write_options)
