"""Figures of one style: fonts, and colours that survive grey print and colour blindness."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from experiment.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's, which differ in lightness, and two more."""
LINES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>PX"
"""What tells curves apart in grey print."""

# For the life of the process: texts take their size when they are made, lines when they are drawn.
matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "savefig.dpi": 200})


def curve_style(index: int, count: int = 10) -> dict[str, object]:
    """Of curve number ``index`` of a figure: colour, dashes, and about ten markers on its ``count`` points."""
    color, line, marker = (names[index % len(names)] for names in (COLOURS, LINES, MARKERS))
    shown = {"markersize": 4, "markeredgewidth": 0, "markevery": max(1, count // 10)}
    return {"color": color, "linestyle": line, "linewidth": 1.4, "marker": marker, **shown}


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of this size in inches, apart from pyplot's global state."""
    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, for the screen, and next to it a PDF, for print; each wholly or not at all."""
    write_atomically(path, partial(figure.savefig, format="png"))
    # Without a date a figure of the same numbers is the same file.
    write_atomically(path.with_suffix(".pdf"), partial(figure.savefig, format="pdf", metadata={"CreationDate": None}))
    return path


def plane(axes: Axes, half_width: float, title: str = "") -> None:
    """A square of the plane, with few ticks."""
    tick = float(f"{0.7 * half_width:.1g}")
    axes.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal", title=title)
    axes.set(xticks=(-tick, 0, tick), yticks=(-tick, 0, tick), xlabel="$x_1$", ylabel="$x_2$")
    axes.label_outer()


def plane_grid(half_width: float, count: int) -> Tensor:
    """The points (count², 2) of a grid on [−w, w]², x₁ running fastest, float64."""
    axis = torch.linspace(-half_width, half_width, count, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).flip(1)


def draw_map(axes: Axes, values: Tensor | np.ndarray, half_width: float, title: str, **options: object) -> AxesImage:
    """Values (count²,) at the points of ``plane_grid``."""
    side, extent = math.isqrt(len(values)), (-half_width, half_width) * 2
    image = axes.imshow(np.asarray(values).reshape(side, side), origin="lower", extent=extent, **options)
    plane(axes, half_width, title)
    return image
