"""Figures of one style: fonts, and colours that survive grey print and colour blindness."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiment.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's, which differ in lightness, and two more."""
LINES = ("-", "--", "-.", ":")

# For the life of the process: texts take their size when they are made, lines when they are drawn.
matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "savefig.dpi": 150})


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of this size in inches, apart from pyplot's global state."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # which animations draw on
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, wholly or not at all."""
    write_atomically(path, partial(figure.savefig, format="png"))
    return path


def plane(axes: Axes, half_width: float, title: str = "") -> None:
    """A square of the plane, with few ticks."""
    tick = float(f"{0.7 * half_width:.1g}")
    axes.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal", title=title)
    axes.set(xticks=(-tick, 0, tick), yticks=(-tick, 0, tick), xlabel="$x_1$", ylabel="$x_2$")
    axes.label_outer()
