"""The report of synthetic runs: what stands in the table, what the comparison concludes, and what the figures show."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import report

STEPS = 60


def metrics(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "nll_bits_per_dim": 3.0,
        "nll_bits_per_dim_se": 0.01,
        "asym": 2.0e8,
        "asym_se": 1.0e7,
        "nasym": 2.0e-3,
        "nasym_se": 1.0e-4,
        "fid": 5.25,
        "kid": 0.004,
        "kid_se": 0.0005,
        "inception_score": 8.5,
        "precision": 0.61,
        "recall": 0.55,
        "nfe_sampling": 1999,
        "nfe_likelihood": 151.37,
        "num_samples": 1000,
        "checkpoint_step": 6000,
        "features": "classifier-digits",
        "sampler": "pc",
        "feature_test_accuracy": 0.975,
        "something_new": [1, 2],
    }
    return values | changes


def make_run(
    path: Path,
    parameterization: str = "unconstrained",
    qc_weight: float = 0.0,
    *,
    dataset: str = "digits",
    channels: int = 1,
    size: int = 8,
    num_levels: int = 17,
    nll: np.ndarray | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A working directory as ``main.py`` leaves it after training and evaluation."""
    rng = np.random.default_rng(seed)
    (path / "eval").mkdir(parents=True)
    config = {
        "seed": 42,
        "data": {"dataset": dataset},
        "model": {"name": "ncsnpp", "parameterization": parameterization},
        "training": {"qc_weight": qc_weight, "n_iters": STEPS * 100},
        "sampling": {"method": "pc"},
    }
    (path / "config.json").write_text(json.dumps(config))
    values = metrics(**changes)
    (path / "eval" / "metrics.json").write_text(json.dumps(values))
    conservative = parameterization == "conservative"
    rows = []
    for k in range(1, STEPS + 1):
        row = {"step": 100 * k, "loss": 1.0, "dsm": (5 / k + 0.5) * math.exp(0.15 * rng.standard_normal()), "lr": 2e-4}
        if qc_weight > 0:
            row["qc"] = None if k % 4 else 0.4 * math.exp(-k / 30 + 0.3 * rng.standard_normal())
        rows.append(row)
        if k % 20 == 0:
            rows.append({"step": 100 * k, "eval_loss": 5 / k + 0.55})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    t = np.arange(1, 51) / 50
    sigma = 0.01 * 5000**t
    scale = 1e-13 if conservative else values["nasym"]
    nasym = scale * 3 * np.exp(-(((t - 0.3) / 0.2) ** 2)) + 0.05 * scale
    asym = nasym * 64 / sigma**4 * 20
    np.savez(
        path / "eval" / "asymmetry.npz",
        t=t, sigma=sigma, asym=asym, asym_se=0.1 * asym, nasym=nasym, nasym_se=0.1 * nasym,
    )  # fmt: skip
    shade = np.linspace(0, num_levels - 1, size)[None, :, None, None] * np.ones((12, 1, size, channels))
    noise = rng.integers(-2, 3, shade.shape)
    images = np.clip(shade + noise, 0, num_levels - 1).astype(np.uint8)
    np.savez(path / "eval" / "samples.npz", images=images, num_levels=np.array(num_levels))
    if nll is not None:
        np.savez(path / "eval" / "nll.npz", nll_bits_per_dim=nll)
    return path


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, Path, Path]:
    """U, QC and C on digits."""
    return (
        make_run(tmp_path / "u"),
        make_run(tmp_path / "qc", qc_weight=1e-4, seed=1, nasym=8e-4, nasym_se=4e-5, asym=5e7, asym_se=2e6, fid=5.5),
        make_run(
            tmp_path / "c", "conservative", seed=2, nll_bits_per_dim=4.1, asym=3e-5, asym_se=1e-6, nasym=1e-13,
            nasym_se=1e-14, precision=None,
        ),
    )  # fmt: skip


def text_of(paths: Sequence[Path], baseline: str | None = None) -> str:
    """The report without the figures, which take most of the time."""
    return report.tables_and_comparisons(report.load_runs(paths), baseline)


def table_row(text: str, name: str) -> dict[str, str]:
    """The cells of the first row whose first cell contains ``name``, by column heading."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    row = next(line for line in lines if name in line.split("|")[1])
    header = next(line for line in reversed(lines[: lines.index(row)]) if line.startswith("| Model"))
    return dict(zip(cells(header), cells(row), strict=True))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def where(image: np.ndarray, color: str, tolerance: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour "#RRGGBB"."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.nonzero((np.abs(image.astype(int) - wanted) <= tolerance).all(axis=2))


# --------------------------------------------------------------------------------------------------------------- table


def test_table_has_every_metric_of_every_run(digits: tuple[Path, ...]) -> None:
    text = text_of(digits)
    u = table_row(text, "U-NCSN++ (u)")
    assert u == {
        "Model (run)": "U-NCSN++ (u)",
        "NLL ↓ (bits/dim)": "3.000 ± 0.010",
        "Asym ↓": "(2.00 ± 0.10)e8",
        "NAsym ↓": "(2.00 ± 0.10)e-3",
        "FID ↓": "**5.25**",
        "KID ↓": "(4.00 ± 0.50)e-3",
        "IS ↑": "8.50",
        "Precision ↑": "0.610",
        "Recall ↑": "0.550",
        "NFE sampling": "1999",
        "NFE likelihood": "151.4",
        "Samples": "1000",
        "Step": "6000",
    }
    assert table_row(text, "qc")["Model (run)"] == "QC-NCSN++ (qc, λ = 1e-4)"
    c = table_row(text, "C-NCSN++ (c)")
    assert c["Precision ↑"] == "–"
    assert c["Asym ↓"] == "**(3.00 ± 0.10)e-5**"
    assert "Zero up to round-off (NAsym below 1e-8): Asym and NAsym of C-NCSN++ (c)." in text


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (None, 0.1, "–"),
        (3.4567, 0.0123, "3.457 ± 0.012"),
        (3.4567, 0.00123, "3.4567 ± 0.0012"),
        (1.881e8, 1.2e6, "(1.881 ± 0.012)e8"),
        (-3e-4, 5e-4, "(-3.0 ± 5.0)e-4"),
        (1e-13, 4e-13, "(1.0 ± 4.0)e-13"),
        (0.0, 0.0, "0"),
        (0.0, None, "0"),
        (0.61, None, "0.610"),
        (10.974, None, "10.97"),
        (0.00212, None, "2.12e-3"),
        (math.nan, 0.1, "nan"),
        (math.inf, None, "inf"),
    ],
)
def test_numbers_are_rounded_by_their_error(value: float | None, error: float | None, expected: str) -> None:
    assert report.format_measurement(value, error) == expected


def test_csv_reads_back_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    keys = [key for key, value in metrics().items() if isinstance(value, float)]
    given = [metrics(**{key: float(rng.lognormal(0, 9)) for key in keys}) for _ in range(2)]
    given[1]["fid"] = None
    report.write_report([make_run(tmp_path / f"run{i}", **values) for i, values in enumerate(given)])
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["run0", "run1"]
    for row, values in zip(rows, given, strict=True):
        for key in [*keys, "nfe_sampling", "num_samples", "checkpoint_step"]:
            assert (float(row[key]) if row[key] else None) == values[key], key


def bold_columns(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The columns in bold of two runs ``a`` and ``b``."""
    runs = [make_run(tmp_path / "a", **first), make_run(tmp_path / "b", **second)]
    text = text_of(runs)
    rows = [table_row(text, name) for name in ("(a)", "(b)")]
    a, b = ({title for title, cell in row.items() if cell.startswith("**")} for row in rows)
    return a, b


@pytest.mark.parametrize(
    ("first", "second", "bold_a", "bold_b"),
    [
        # Two combined standard errors of the NLL are 2 √2 · 0.01 = 0.0283.
        ({"nll_bits_per_dim": 2.973}, {}, set(), set()),
        ({"nll_bits_per_dim": 2.970}, {}, {"NLL ↓ (bits/dim)"}, set()),
        ({}, {"nll_bits_per_dim": 2.970}, set(), {"NLL ↓ (bits/dim)"}),
        ({"nll_bits_per_dim": 2.970, "nll_bits_per_dim_se": None}, {}, set(), set()),
        ({"nll_bits_per_dim": math.nan}, {}, set(), set()),
        ({"kid": 0.0027}, {}, set(), set()),
        ({"kid": 0.0024}, {}, {"KID ↓"}, set()),
        # Without standard errors the best stands in bold; for IS, precision and recall that is the largest.
        ({"fid": 5.24, "recall": 0.56}, {"inception_score": 8.6}, {"FID ↓", "Recall ↑"}, {"IS ↑"}),
        ({"precision": None}, {"precision": 0.2}, set(), set()),
        # Other features, or another number of samples, give numbers that cannot be ranked.
        ({"fid": 1.0, "features": "inception"}, {}, set(), set()),
        ({"fid": 1.0, "num_samples": 500}, {}, set(), set()),
        ({"nfe_sampling": 10}, {}, set(), set()),
    ],
)
def test_bold_marks_only_what_is_best(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], bold_a: set[str], bold_b: set[str]
) -> None:
    assert bold_columns(tmp_path, first, second) == (bold_a, bold_b)


def test_bold_needs_a_lead_over_the_runner_up(tmp_path: Path) -> None:
    """Three runs: the best is far ahead of the last but not of the second; equals without errors share the bold."""
    nll_and_fid = ((2.50, 7.0), (2.51, 4.0), (3.0, 4.0))
    paths = [make_run(tmp_path / f"r{i}", nll_bits_per_dim=nll, fid=fid) for i, (nll, fid) in enumerate(nll_and_fid)]
    text = text_of(paths)
    rows = [table_row(text, f"(r{i})") for i in range(3)]
    assert [row["NLL ↓ (bits/dim)"].startswith("**") for row in rows] == [False, False, False]
    assert [row["FID ↓"].startswith("**") for row in rows] == [False, True, True]


def test_mixed_features_are_said_to_be_incomparable(tmp_path: Path) -> None:
    text = text_of([make_run(tmp_path / "a"), make_run(tmp_path / "b", features="inception")])
    assert "must not be compared with one another" in text
    assert "a: classifier-digits, 1000; b: inception, 1000" in text


def test_classifier_features_are_said_not_to_be_inception(digits: tuple[Path, ...], tmp_path: Path) -> None:
    text = text_of(digits)
    assert "classifier-digits (its test accuracy is 97.5 %)" in text
    assert "comparable within this report only, not with Inception FID" in text
    inception = text_of([make_run(tmp_path / "inception" / "u", features="inception")])
    assert "comparable within" not in inception


# -------------------------------------------------------------------------------------------------- the paper's numbers


def test_paper_row_of_cifar10(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "u", dataset="CIFAR10", channels=3, size=32, num_levels=256),
        make_run(tmp_path / "qc", qc_weight=1e-4, dataset="CIFAR10", channels=3, size=32, num_levels=256),
    ]
    text = text_of(runs)
    assert table_row(text, "QC-NCSN++ (paper)") == {
        "Model": "QC-NCSN++ (paper)",
        "NLL ↓ (bits/dim)": "3.38",
        "Asym ↓": "3.49e7",
        "NAsym ↓": "8.41e-4",
        "FID ↓": "2.48",
        "IS ↑": "9.70",
        "Precision ↑": "0.67",
        "Recall ↑": "0.60",
        "NFE (predictor steps)": "1000",
    }
    assert table_row(text, "U-NCSN++ (paper)")["NAsym ↓"] == "1.90e-3"
    assert "arXiv 2209.12753" in text
    assert "C-NCSN++ (paper)" not in text.replace("QC-NCSN++ (paper)", "")  # no C run, no C row


@pytest.mark.parametrize(
    ("dataset", "nll"),
    [("svhn", "5.00"), ("cifar100", "5.34"), ("imagenet32", "5.10"), ("ImageNet-32x32", "5.10"), ("cifar-10", "5.91")],
)
def test_paper_row_of_the_conservative_model(tmp_path: Path, dataset: str, nll: str) -> None:
    row = table_row(text_of([make_run(tmp_path / "c", "conservative", dataset=dataset)]), "(paper)")
    assert (row["Model"], row["NLL ↓ (bits/dim)"], row["Asym ↓"]) == ("C-NCSN++ (paper)", nll, "0")
    assert ("FID ↓" in row) == (dataset not in ("svhn", "cifar100"))


def test_the_paper_ranks_qc_above_u_above_c() -> None:
    """What the paper concludes from its tables holds for the numbers typed here."""
    assert set(report.PAPER) == {"cifar10", "imagenet32", "cifar100", "svhn"}
    for rows in report.PAPER.values():
        assert rows["QC"]["nll_bits_per_dim"] < rows["U"]["nll_bits_per_dim"] < rows["C"]["nll_bits_per_dim"]
        for key in ("asym", "nasym"):
            assert 0 == rows["C"][key] < rows["QC"][key] < rows["U"][key]
        if "fid" in rows["U"]:
            assert rows["QC"]["fid"] < rows["U"]["fid"] < rows["C"]["fid"]


def test_a_set_the_paper_does_not_have(digits: tuple[Path, ...]) -> None:
    text = text_of(digits)
    assert "The paper has no numbers for this data set (digits)." in text
    assert "(paper)" not in text


# --------------------------------------------------------------------------------------------------------- comparisons


def test_paired_difference_by_hand(tmp_path: Path) -> None:
    """d = (−0.1, −0.2, −0.1): mean −0.4/3 = −0.1333, std √(0.02/3 / 2) = 0.05774, s.e. 0.05774/√3 = 0.03333."""
    u, qc = np.array([2.0, 3.0, 4.0]), np.array([1.9, 2.8, 3.9])
    runs = [
        make_run(tmp_path / "u", nll=u, nll_bits_per_dim=u.mean(), nll_bits_per_dim_se=0.58),
        make_run(tmp_path / "qc", qc_weight=1.0, nll=qc, nll_bits_per_dim=qc.mean(), nll_bits_per_dim_se=0.58),
    ]
    text = text_of(runs)
    expected = "ΔNLL = -0.133 ± 0.033 bits/dim (paired over 3 test images); lower (better) by 4.0 standard errors."
    assert expected in text
    # The same runs without the per-image values: √2 · 0.58 = 0.82.
    (runs[1] / "eval" / "nll.npz").unlink()
    text = text_of(runs)
    expected = "ΔNLL = -0.13 ± 0.82 bits/dim (unpaired: qc has no eval/nll.npz); the two cannot be told apart"
    assert expected in text


@pytest.mark.parametrize("other", [np.full(4, 2.9), np.full(3, 7.0)], ids=["other length", "stale file"])
def test_runs_that_do_not_fit_are_not_paired(tmp_path: Path, other: np.ndarray) -> None:
    runs = [
        make_run(tmp_path / "u", nll=np.full(3, 3.0), nll_bits_per_dim=3.0),
        make_run(tmp_path / "qc", qc_weight=1.0, nll=other, nll_bits_per_dim=2.9),
    ]
    text = text_of(runs)
    assert "ΔNLL = -0.100 ± 0.014 bits/dim (unpaired: " in text
    assert ("4 and 3 test images)" if len(other) == 4 else "of qc are not of one evaluation)") in text


def test_ratio_and_its_error_by_hand(digits: tuple[Path, ...]) -> None:
    """NAsym: 8e-4/2e-3 = 0.4, relative errors 5 % and 5 %, together 7.07 %: 0.0283. Asym: 0.25, 4 % and 5 %."""
    text = text_of(digits)
    assert "NAsym: 0.400 ± 0.028 times the baseline's; lower." in text
    assert "Asym: 0.250 ± 0.016 times the baseline's; lower." in text
    assert "NAsym: zero up to round-off (1.00e-13; baseline 2.00e-3)." in text


def test_ratio_within_two_errors_is_no_difference(tmp_path: Path) -> None:
    """2 √2 · 1e-4 = 2.83e-4 between NAsym 2.0e-3 and 1.75e-3 or 1.70e-3."""
    nasym = {"u": 2.0e-3, "near": 1.75e-3, "far": 1.70e-3}
    runs = [make_run(tmp_path / name, nasym=value) for name, value in nasym.items()]
    text = text_of(runs)
    near, far = text.split("(near) against the baseline:")[1].split("(far) against the baseline:")
    assert "NAsym: 0.875 ± 0.066 times the baseline's; the two cannot be told apart" in near
    assert "NAsym: 0.850 ± 0.066 times the baseline's; lower." in far


def test_baseline(digits: tuple[Path, ...], tmp_path: Path) -> None:
    u, qc, c = digits
    assert "Baseline: U-NCSN++ (u)." in text_of([c, qc, u])
    text = text_of([u, qc, c], baseline="c")
    assert "Baseline: C-NCSN++ (c)." in text
    assert "NAsym: no ratio, the baseline's is zero up to round-off." in text
    assert "no --baseline was given" in text_of([qc, c])
    assert "nothing to compare" in text_of([u])
    longer = make_run(tmp_path / "longer", checkpoint_step=9000)
    assert "step 9000, the baseline's 6000" in text_of([u, longer])


def test_missing_errors_allow_no_conclusion(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v", nll_bits_per_dim_se=None, nasym_se=None, asym=None)]
    text = text_of(runs)
    assert text.count("nothing can be concluded") == 2
    assert "Asym: not computed for both runs." in text


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_have_the_size_of_a_page(digits: tuple[Path, ...], tmp_path: Path) -> None:
    text = report.write_report(digits)
    for name in ("asymmetry_vs_t.png", "samples_same_seed.png", "training_curves.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / name) as image:
            assert image.width <= 6.9 * 200 + 1
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    assert not list(tmp_path.glob(".*")), "temporary files stay"


def test_asymmetry_figure_puts_u_above_qc_and_c_into_the_legend(digits: tuple[Path, ...], tmp_path: Path) -> None:
    report.write_report(digits)
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
    figure, notes = report._asymmetry_figure([report.load_run(path) for path in digits])
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["U-NCSN++ (u)", "QC-NCSN++ (qc, λ = 1e-4)", "C-NCSN++ (c): 0 (NAsym ≤ 3e-13), not drawn"]
    assert notes == []
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() and axes.get_ylabel()
    low, high = figure.axes[1].get_ylim()
    assert 1e-6 < low < high < 1


def test_curves_and_bands_are_the_numbers_of_the_files(digits: tuple[Path, ...]) -> None:
    figure, _ = report._asymmetry_figure([report.load_run(path) for path in digits[:2]])
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
    report.write_report(runs)
    image = pixels(tmp_path / "samples_same_seed.png")
    centres = {}
    for k in range(2):
        for i in range(10):
            rows, columns = where(image, f"#{levels[i]:02x}{100 * k + 50:02x}00", tolerance=1)
            side = columns.max() - columns.min() + 1
            assert side % 8 == 0 and side > 60
            assert len(rows) == side * (rows.max() - rows.min() + 1) == side**2
            centres[k, i] = (rows.mean(), columns.mean())
    for k in range(2):
        assert len({centres[k, i][0] for i in range(10)}) == 1
        assert np.ptp(np.diff([centres[k, i][1] for i in range(10)])) == 0
    assert centres[0, 0][0] < centres[1, 0][0]
    assert [centres[0, i][1] for i in range(10)] == [centres[1, i][1] for i in range(10)]


def test_samples_reach_full_white_at_the_highest_level(tmp_path: Path) -> None:
    run = make_run(tmp_path / "u")
    np.savez(run / "eval" / "samples.npz", images=np.full((2, 8, 8, 1), 16, np.uint8), num_levels=np.array(17))
    np.testing.assert_array_equal(report.load_run(run).samples, 1.0)


def test_different_samplers_and_seeds_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v", sampler="ode")]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"seed": 43}))
    text = report.write_report(runs)
    assert "The runs were sampled differently (u: pc; v: ode)." in text
    assert "the runs differ in sampler (ode, pc)" in text
    assert "the runs differ in config.seed (42, 43)" in text


def test_training_figure_has_a_qc_panel_only_where_there_is_a_qc_term(digits: tuple[Path, ...]) -> None:
    u, qc, c = (report.load_run(path) for path in digits)
    both, _ = report._training_figure([u, qc, c])
    assert [axes.get_ylabel() for axes in both.axes] == ["DSM loss", "QC term $L_\\mathrm{QC}$"]
    steps = both.axes[1].get_lines()[1].get_xdata()
    np.testing.assert_array_equal(steps, np.arange(400, 6001, 400))  # null on the lazy steps
    one, _ = report._training_figure([u, c])
    assert len(one.axes) == 1
    assert "test loss" in [text.get_text() for text in one.legends[0].get_texts()]


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(report._running_mean(values, 3), [1.5, 3.0, 4.0, 5.0])


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "u")
    rows = [{"step": 1, "dsm": 5.0}, {"step": 2, "dsm": 9.0}, {"step": 2, "eval_loss": 7.0}, {"step": 2, "dsm": 4.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    log = report.load_run(run).log
    assert [row.get("dsm") for row in log] == [5.0, 4.0, None]
    assert log[2]["eval_loss"] == 7.0


def test_what_is_missing_is_said_and_no_older_figure_stays(digits: tuple[Path, ...], tmp_path: Path) -> None:
    qc = digits[1]
    report.write_report(digits)
    (qc / "eval" / "samples.npz").unlink()
    (qc / "eval" / "asymmetry.npz").unlink()
    (qc / "metrics.jsonl").unlink()
    text = report.write_report(digits)
    for file in ("eval/samples.npz", "eval/asymmetry.npz", "metrics.jsonl"):
        assert f"QC-NCSN++ (qc, λ = 1e-4) has no {file}." in text
    assert (tmp_path / "samples_same_seed.png").is_file()
    text = report.write_report([qc], output=tmp_path)
    for name in ("asymmetry_vs_t.png", "samples_same_seed.png", "training_curves.png"):
        assert f"`{name}` was not drawn." in text
        assert not (tmp_path / name).exists()


def test_samples_of_different_sizes_are_not_drawn(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v", size=16)]
    assert "The samples differ in size: (8, 8, 1), (16, 16, 1) (H, W, C)." in report.write_report(runs)
    assert not (tmp_path / "samples_same_seed.png").exists()


# ------------------------------------------------------------------------------------------------- names and the output


def test_output_folder(digits: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "folder"
    assert report.main([*map(str, digits), "--output", str(target), "--baseline", "qc"]) == 0
    printed = capsys.readouterr().out
    assert printed == (target / "report.md").read_text()
    assert "Baseline: QC-NCSN++" in printed
    assert not (tmp_path / "report.md").exists()


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first" / "u"), make_run(tmp_path / "second" / "u")]
    text = report.write_report(runs)
    assert table_row(text, "first/u")["Model (run)"] == "U-NCSN++ (first/u)"
    assert (tmp_path / "report.md").is_file()
    with pytest.raises(ValueError, match="'u' fits more than one run; allowed: first/u, second/u"):
        report.write_report(runs, baseline="u")


def test_label_and_architecture_come_from_the_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "u")
    config = json.loads((run / "config.json").read_text()) | {"label": "600k"}
    config["model"]["embedding_type"] = "positional"
    (run / "config.json").write_text(json.dumps(config))
    assert report.load_run(run).label == "U-DDPM++ (600k)"


def test_help_is_quick() -> None:
    """Neither torch nor matplotlib is loaded before there is something to draw."""
    code = "import sys, report; print({'torch', 'matplotlib'} & set(sys.modules))"
    root = Path(report.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -------------------------------------------------------------------------------------------------------------- errors


def damage(run: Path, file: str, content: str | bytes) -> None:
    (run / file).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_config(run: Path, **sections: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | sections))


ERRORS: dict[str, tuple[Any, str]] = {
    "no folder": (lambda u: shutil.rmtree(u), "no such folder"),
    "no config": (lambda u: (u / "config.json").unlink(), "no config.json"),
    "not evaluated": (
        lambda u: (u / "eval" / "metrics.json").unlink(),
        "run --mode eval first: python main.py --config=... --workdir=",
    ),
    "damaged config": (lambda u: damage(u, "config.json", '{\n"data": {\n'), "config.json, line 3: damaged JSON"),
    "damaged metrics": (lambda u: damage(u, "eval/metrics.json", '{"fid": 1,\n\n'), "metrics.json, line 3: damaged"),
    "truncated log": (
        lambda u: damage(u, "metrics.jsonl", '{"step": 1, "dsm": 2}\n{"step": 2, "ds'),
        "metrics.jsonl, line 2: damaged JSON",
    ),
    "log of lists": (lambda u: damage(u, "metrics.jsonl", '{"step": 1}\n\n[1]\n'), "metrics.jsonl, line 3: a JSON"),
    "log without steps": (lambda u: damage(u, "metrics.jsonl", '{"dsm": 1}'), "metrics.jsonl, line 1: the row has no"),
    "log of words": (lambda u: damage(u, "metrics.jsonl", '{"step": 1, "dsm": "1"}'), "line 1: dsm='1'; a number"),
    "not text": (lambda u: damage(u, "metrics.jsonl", b'{"step": 1}\n\xff'), "metrics.jsonl, line 2: damaged JSON"),
    "metric of words": (lambda u: damage(u, "eval/metrics.json", '{"fid": "low"}'), "fid='low'; a number or null"),
    "sampler number": (lambda u: damage(u, "eval/metrics.json", '{"sampler": 1}'), "sampler=1; a string or null"),
    "no data set": (lambda u: edit_config(u, data={}), "config.data.dataset is missing"),
    "unknown model": (
        lambda u: edit_config(u, model={"parameterization": "free"}),
        "config.model.parameterization='free'; allowed: 'unconstrained', 'conservative'",
    ),
    "weight of words": (lambda u: edit_config(u, training={"qc_weight": "1"}), "config.training.qc_weight='1'"),
    "other data": (lambda u: edit_config(u, data={"dataset": "mnist"}), "config.data.dataset='digits' in"),
    "other file": (
        lambda u: edit_config(u, data={"dataset": "digits", "path": "mine.npz"}),
        "config.data.path=None in",
    ),
    "damaged samples": (lambda u: damage(u, "eval/samples.npz", b"PK\x03\x04 no archive"), "samples.npz: damaged"),
    "no archive": (
        lambda u: (np.save(u / "array.npy", np.zeros(3)), (u / "array.npy").rename(u / "eval" / "nll.npz")),
        "nll.npz: damaged, or not a .npz archive",
    ),
    "objects": (
        lambda u: np.savez(u / "eval" / "nll.npz", nll_bits_per_dim=np.array([None])),
        "nll.npz: damaged, or not a .npz archive of plain arrays",
    ),
    "other arrays": (lambda u: np.savez(u / "eval" / "nll.npz", nll=np.zeros(3)), "must hold the arrays nll_bits_per"),
    "no images": (
        lambda u: np.savez(u / "eval" / "nll.npz", nll_bits_per_dim=np.zeros(0)),
        "nll_bits_per_dim must have the shape (N,); found (0,)",
    ),
    "float images": (
        lambda u: np.savez(u / "eval" / "samples.npz", images=np.zeros((2, 8, 8, 1)), num_levels=17),
        "images must be uint8",
    ),
    "too bright": (
        lambda u: np.savez(u / "eval" / "samples.npz", images=np.full((2, 8, 8, 1), 17, np.uint8), num_levels=17),
        "num_levels=17 does not fit the largest pixel level 17",
    ),
    "uneven arrays": (
        lambda u: np.savez(
            u / "eval" / "asymmetry.npz",
            **{key: np.zeros(3 + (key == "nasym")) for key in ("t", "sigma", "asym", "asym_se", "nasym", "nasym_se")},
        ),
        "asymmetry.npz: its arrays must all have one shape (T,)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_damaged_run_is_one_line_and_code_2(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = ERRORS[name]
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    spoil(bad)
    assert report.main([str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert str(bad) in captured.err
    assert not (tmp_path / "report.md").exists()


def test_wrong_arguments(digits: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    u, qc, _ = map(str, digits)
    occupied = tmp_path / "file"
    occupied.touch()
    for arguments, message in (
        ([u, qc, f"{tmp_path}/qc/../u"], "the run is given twice"),
        ([u, qc, "--baseline", "c"], "--baseline='c' is not among the runs; allowed: u, qc"),
        ([u, "--output", str(occupied)], "is a file; a folder is needed"),
        ([u, "--output", str(occupied / "below")], "Not a directory"),
    ):
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report.md").exists()
