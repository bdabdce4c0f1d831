"""The report's figures of synthetic runs: pixels and curves are the numbers of the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_runs import make_run, u_qc_and_c

from report import figures, main
from report.runs import load_run


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, Path, Path]:
    return u_qc_and_c(tmp_path)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def where(image: np.ndarray, color: str, tolerance: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour "#RRGGBB"."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.nonzero((np.abs(image.astype(int) - wanted) <= tolerance).all(axis=2))


def test_figures_have_the_size_of_a_page(digits: tuple[Path, ...], tmp_path: Path) -> None:
    text = main.write_report(*digits)
    for name in ("asymmetry_vs_t.png", "samples_same_seed.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / name) as image:
            assert image.width <= 6.9 * 200 + 1
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_asymmetry_figure_puts_u_above_qc_and_c_into_the_legend(digits: tuple[Path, ...], tmp_path: Path) -> None:
    main.write_report(*digits)
    image = pixels(tmp_path / "asymmetry_vs_t.png")
    blue, vermillion, green = (where(image, color) for color in ("#0072B2", "#D55E00", "#009E73"))
    legend = blue[0].max() - 20  # the first curve's entry is the lowest thing in its colour
    for left, right in ((0, image.shape[1] // 2), (image.shape[1] // 2, image.shape[1])):
        u, qc = (rows[(columns >= left) & (columns < right) & (rows < legend)] for rows, columns in (blue, vermillion))
        assert len(u) > 500 and len(qc) > 500
        assert u.mean() < qc.mean()  # rows count from the top
    assert len(green[0]) > 20
    assert green[0].min() > legend


def test_zero_curve_is_named_as_zero(digits: tuple[Path, ...]) -> None:
    figure, notes = figures.asymmetry_figure([load_run(path) for path in digits])
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["U-NCSN++ (u)", "QC-NCSN++ (qc, λ = 0.0001)", "C-NCSN++ (c): 0 (NAsym ≤ 3e-13), not drawn"]
    assert notes == []
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() and axes.get_ylabel()
    low, high = figure.axes[1].get_ylim()
    assert 1e-6 < low < high < 1


def test_curves_and_bands_are_the_numbers_of_the_files(digits: tuple[Path, ...]) -> None:
    figure, _ = figures.asymmetry_figure([load_run(path) for path in digits[:2]])
    with np.load(digits[1] / "eval" / "asymmetry.npz", allow_pickle=False) as arrays:
        for axes, key in zip(figure.axes, ("asym", "nasym"), strict=True):
            np.testing.assert_array_equal(axes.get_lines()[1].get_xdata(), arrays["t"])
            np.testing.assert_array_equal(axes.get_lines()[1].get_ydata(), arrays[key])
            band = axes.collections[1].get_paths()[0].vertices
            assert band[:, 1].max() == pytest.approx(1.1 * arrays[key].max())
            assert band[:, 1].min() == pytest.approx(0.9 * arrays[key].min())


def test_samples_stand_in_rows_of_runs_and_columns_of_seeds(tmp_path: Path) -> None:
    """Every image has a colour of its own; the figure shows it unblurred, in its run's row and its seed's column."""
    levels = np.arange(12) * 20 + 10
    runs = []
    for k in range(2):
        runs.append(make_run(tmp_path / f"u{k}", channels=3, num_levels=256))
        images = np.zeros((12, 8, 8, 3), np.uint8)
        images[..., 0], images[..., 1] = levels[:, None, None], 100 * k + 50
        np.savez(runs[k] / "eval" / "samples.npz", images=images, num_levels=np.array(256))
    main.write_report(*runs)
    image = pixels(tmp_path / "samples_same_seed.png")
    centres = np.zeros((2, 10, 2))
    for k in range(2):
        for i in range(10):
            rows, columns = where(image, f"#{levels[i]:02x}{100 * k + 50:02x}00", tolerance=1)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert width > 60 and abs(height - width) <= 2 and len(rows) >= 0.95 * height * width
            centres[k, i] = rows.mean(), columns.mean()
    assert (centres[0, :, 0] < centres[1, :, 0]).all() and np.ptp(centres[:, :, 0], axis=1).max() <= 1
    assert np.abs(centres[0, :, 1] - centres[1, :, 1]).max() <= 1 and (np.diff(centres[0, :, 1]) > 60).all()


def test_samples_reach_full_white_at_the_highest_level(tmp_path: Path) -> None:
    run = make_run(tmp_path / "u")
    np.savez(run / "eval" / "samples.npz", images=np.full((2, 8, 8, 1), 16, np.uint8), num_levels=np.array(17))
    np.testing.assert_array_equal(load_run(run).samples, 1.0)


def test_different_samplers_and_seeds_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v", sampler="ODE")]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"seed": 43}))
    text = main.write_report(*runs)
    assert "Sampler: u: PC, euler_maruyama + none, 100 steps; v: ODE." in text
    assert "the runs differ in sampler (ODE, PC, euler_maruyama + none, 100 steps)" in text
    assert "the runs differ in config.seed (42, 43)" in text


def test_what_is_missing_is_said_and_no_older_figure_is_left(digits: tuple[Path, ...], tmp_path: Path) -> None:
    qc = digits[1]
    main.write_report(*digits)
    (qc / "eval" / "samples.npz").unlink()
    (qc / "eval" / "asymmetry.npz").unlink()
    text = main.write_report(*digits)
    for what in ("eval/samples.npz", "eval/asymmetry.npz"):
        assert f"QC-NCSN++ (qc, λ = 0.0001) has no {what}." in text
    assert (tmp_path / "samples_same_seed.png").is_file()
    text = main.write_report(qc, output=tmp_path)
    assert "## Likelihood" not in text
    for name in ("asymmetry_vs_t.png", "samples_same_seed.png"):
        assert name not in text
        assert not (tmp_path / name).exists()
