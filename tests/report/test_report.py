"""The report of synthetic runs: what stands in the table, and what the comparison concludes."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_run, metrics, u_qc_and_c

from report import main
from report.runs import load_run, load_runs


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, Path, Path]:
    return u_qc_and_c(tmp_path)


def text_of(paths: Sequence[Path], baseline: str = "") -> str:
    """The report without the figures, which take most of the time."""
    return main.report_text(load_runs(paths), baseline)


def table_row(text: str, name: str) -> dict[str, str]:
    """The cells of the first row whose first cell contains ``name``, by column heading."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    row = next(line for line in lines if name in line.split("|")[1])
    header = next(line for line in reversed(lines[: lines.index(row)]) if line.startswith("| Model"))
    return dict(zip(cells(header), cells(row), strict=True))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# --------------------------------------------------------------------------------------------------------------- table


def test_table_has_every_metric_of_every_run(digits: tuple[Path, ...]) -> None:
    text = text_of(digits)
    u = table_row(text, "U-NCSN++ (u)")
    assert u == {
        "Model (run)": "U-NCSN++ (u)",
        "NLL ↓ (bits/dim)": "3.000 ± 0.010",
        "Asym ↓": "(2.00 ± 0.10)e8",
        "NAsym ↓": "0.00200 ± 0.00010",
        "FID ↓": "5.25",
        "KID ↓": "0.00400 ± 0.00050",
        "IS ↑": "8.5",
        "Precision ↑": "0.61",
        "Recall ↑": "0.55",
        "NFE sampling": "1999",
        "NFE likelihood": "151.4",
        "Samples": "1000",
        "Step": "6000",
    }
    assert table_row(text, "qc")["Model (run)"] == "QC-NCSN++ (qc, λ = 0.0001)"
    c = table_row(text, "C-NCSN++ (c)")
    assert c["Precision ↑"] == "–"
    assert c["Asym ↓"] == "**(3.00 ± 0.10)e-5**"
    assert "Zero up to round-off (NAsym below 1e-08): Asym and NAsym of C-NCSN++ (c)." in text


def test_csv_reads_back_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    keys = [key for key, value in metrics().items() if isinstance(value, float)]
    given = [metrics(**{key: float(rng.lognormal(0, 9)) for key in keys}) for _ in range(2)]
    given[1]["fid"] = None
    main.write_report(*(make_run(tmp_path / f"run{i}", **values) for i, values in enumerate(given)))
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
        # Nothing without standard errors.
        ({"fid": 1.0, "recall": 0.9}, {"inception_score": 9.6}, set(), set()),
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
    """Three runs: the best is far ahead of the last but not of the second, unless they are compared by image."""
    rng = np.random.default_rng(0)
    images = rng.normal(2.5, 1, 400)
    values = [images, images + rng.normal(0.02, 0.01, 400), images + rng.normal(0.5, 0.01, 400)]
    for paired in (False, True):
        paths = [
            make_run(
                tmp_path / f"{paired}" / f"r{i}",
                nll=nll if paired else None,
                nll_bits_per_dim=nll.mean(),
                nll_bits_per_dim_se=0.05,
            )
            for i, nll in enumerate(values)
        ]
        text = text_of(paths)
        bold = [table_row(text, f"(r{i})")["NLL ↓ (bits/dim)"].startswith("**") for i in range(3)]
        assert bold == [paired, False, False]


def test_mixed_features_are_said_to_be_incomparable(tmp_path: Path) -> None:
    text = text_of([make_run(tmp_path / "a"), make_run(tmp_path / "b", features="inception")])
    assert "must not be compared with one another" in text
    compared = "1000 samples against 1437 (training images)"
    assert f"Features: a: classifier-digits, {compared}; b: inception, {compared}." in text
    statistics = dict(features="inception", reference="cifar10_stats.npz", num_reference=50_000)
    text = text_of([make_run(tmp_path / "c", features="inception"), make_run(tmp_path / "d", **statistics)])
    assert "d: inception, 1000 samples against 50000 (cifar10_stats.npz)" in text
    assert "must not be compared with one another" in text


def test_what_gave_the_numbers_is_said(tmp_path: Path) -> None:
    measured = dict(features="inception", reference="training images", num_reference=50_000)
    paths = [make_run(tmp_path / backend, backend=backend, **measured) for backend in ("torch", "tensorflow-gan")]
    expected = "Features: inception, 1000 samples against 50000 (training images)"
    assert f"{expected}. FID, KID and IS computed by tensorflow-gan and torch." in text_of(paths)
    assert f"{expected}. FID, KID and IS computed by torch." in text_of(paths[:1])


def test_classifier_features_are_said_not_to_be_inception(digits: tuple[Path, ...], tmp_path: Path) -> None:
    text = text_of(digits)
    assert "classifier-digits (test accuracy 97.5 %)" in text
    assert "comparable within this report only, not with Inception FID" in text
    for features in ("inception", "inception-tfhub"):
        assert "comparable within" not in text_of([make_run(tmp_path / features / "u", features=features)])
    other = text_of([make_run(tmp_path / "other" / "u", features="inception-12345678")])
    assert "inception-12345678 (not the published weights): they are comparable within" in other


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
    assert "NAsym: zero up to round-off (1.00e-13; baseline 0.002)." in text


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
    assert "Baseline" not in text_of([u]) and "No comparison" not in text_of([u])
    longer = make_run(tmp_path / "longer", checkpoint_step=9000)
    assert "step 9000, the baseline's 6000" in text_of([u, longer])


def test_every_data_set_has_its_own_section_baseline_and_figures(tmp_path: Path) -> None:
    """Two sets, two runs each: compared within a set only, whether the baseline is chosen or named."""
    paths = [
        make_run(tmp_path / dataset / name, qc_weight=weight, dataset=dataset)
        for dataset in ("digits", "SVHN")
        for name, weight in (("u", 0.0), ("qc", 1e-4))
    ]
    text = main.write_report(*paths)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# Results on digits", "# Results on SVHN", "# Tables 2 and 3 of the paper",
    ]  # fmt: skip
    digits, svhn = text.split("# Results on SVHN")
    for part, name in ((digits, "digits"), (svhn, "SVHN")):
        assert f"Baseline: U-NCSN++ ({name}/u)." in part
        assert f"QC-NCSN++ ({name}/qc, λ = 0.0001) against the baseline" in part
    assert "![Asym and NAsym against t](1_digits_asymmetry_vs_t.png)" in digits
    assert "![Asym and NAsym against t](2_svhn_asymmetry_vs_t.png)" in svhn
    assert len(list(tmp_path.glob("*.png"))) == 4
    text = text_of(paths, "qc")
    assert text.count("Baseline: QC-NCSN++") == 2
    text = text_of(paths, "SVHN/qc")
    assert "Baseline: U-NCSN++ (digits/u)" in text and "Baseline: QC-NCSN++ (SVHN/qc" in text


@pytest.mark.parametrize("data", [{"dataset": "mnist"}, {"path": "mine.npz"}, {"image_size": 16}], ids=str)
def test_other_data_are_never_compared(tmp_path: Path, data: dict[str, Any]) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v")]
    edit_config(runs[1], data={"dataset": "digits", "path": "", "image_size": 8} | data)
    text = text_of(runs)
    assert text.count("# Results on ") == 2 and "Baseline" not in text


def test_a_part_of_the_test_set_is_said(tmp_path: Path) -> None:
    part = dict(nll_images=100, test_images=10000)
    part |= dict(asym_levels=100)
    runs = [
        make_run(tmp_path / "u", **part, asym_images=8, asym_first_level=0),
        make_run(tmp_path / "v", **part, asym_images=10000, asym_first_level=1),
    ]
    text = text_of(runs)
    assert "Test images of NLL: 100 of 10000." in text
    assert "Test images of Asym and NAsym: u: 8 of 10000; v: 10000 of 10000." in text
    assert "Noise levels of Asym and NAsym: u: t = i/100 from i = 0; v: t = i/100 from i = 1." in text


def test_missing_errors_allow_no_conclusion(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "u"), make_run(tmp_path / "v", nll_bits_per_dim_se=None, nasym_se=None, asym=None)]
    text = text_of(runs)
    assert text.count("nothing can be concluded") == 2
    assert "Asym: not computed for both runs." in text


# ------------------------------------------------------------------------------------------------- names and the output


def test_every_sampler_that_was_used_has_its_share_of_samples_out_of_range(tmp_path: Path) -> None:
    """That of the evaluation and those of --mode=sample with the same weights; those of others do not count."""
    run = make_run(tmp_path / "u")
    for step, share in ((6000, 0.125), (3000, 0.5)):
        folder = run / "samples" / f"step_{step:08d}-ode-rk45-1234"
        folder.mkdir(parents=True)
        row = {"sampler": "ODE, rk45", "nfe_sampling": 81.5, "num_samples": 64, "outside_range": share}
        (folder / "metrics.json").write_text(json.dumps(row))
    lines = text_of([run]).partition("## Samples")[2].splitlines()
    found = [cells(line)[1:] for line in lines if line.startswith("| U-NCSN++ (u)")][:2]
    assert found == [
        ["PC, euler_maruyama + none, 100 steps", "1999", "1000", "25 %"],
        ["ODE, rk45", "81.5", "64", "12.5 %"],
    ]


def test_where_a_run_comes_from(tmp_path: Path) -> None:
    """Training that was stopped after 40 s and then took 20 s took a minute."""
    run = make_run(tmp_path / "u")
    rows = [{"step": i, "dsm": 1.0, "seconds": s} for i, s in enumerate((20.0, 40.0, 5.0, 20.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = next(line for line in text_of([run]).partition("## Provenance")[2].splitlines() if "(u)" in line)
    today = f"{date.fromtimestamp((run / 'eval' / 'metrics.json').stat().st_mtime)}"
    expected = ["0123456789ab", today, "42", "79,585", "6000", "1.0 min", "a processor, torch 2.14"]
    assert cells(row)[1:-1] == expected and f"--workdir={run} --mode=eval" in cells(row)[-1]


def test_html_is_one_file_with_a_caption_under_every_figure(digits: tuple[Path, ...], tmp_path: Path) -> None:
    text = main.write_report(*digits)
    page = (tmp_path / "report.html").read_text()
    assert "width=device-width" in page and page.count("<table>") == text.count("\n| ---")
    figures = re.findall(
        r'<figure><img alt="[^"]+" src="data:image/png;base64,([^"]+)"><figcaption>(.+?)</figcap', page
    )
    names = ("asymmetry_vs_t.png", "samples_same_seed.png")
    assert [base64.b64decode(data) for data, _ in figures] == [(tmp_path / name).read_bytes() for name in names]
    assert page.count("<img") == 2 and "as Figure 3a" in figures[0][1] and "as Figure 3b" in figures[1][1]
    assert page.index("against the baseline") < page.index("as Figure 3a") < page.index("<h2>Samples")


def test_command(digits: tuple[Path, ...], tmp_path: Path) -> None:
    """Runs are words of the command line, the rest are flags."""
    target = tmp_path / "new" / "folder"
    command = [sys.executable, "-m", "report.main", *map(str, digits), "--output", str(target)]
    root = Path(main.__file__).parents[1]
    done = subprocess.run([*command, "--baseline=qc"], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == (target / "report.md").read_text() and "Baseline: QC-NCSN++" in done.stdout
    assert not (tmp_path / "report.md").exists()
    with pytest.raises(ValueError, match=r"^--baseline='c2' is not among the runs; allowed: u, qc, c$"):
        main.write_report(*digits, output=target, baseline="c2")


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first" / "u"), make_run(tmp_path / "second" / "u")]
    text = main.write_report(*runs)
    assert table_row(text, "first/u")["Model (run)"] == "U-NCSN++ (first/u)"
    assert (tmp_path / "report.md").is_file()
    with pytest.raises(ValueError, match="'u' fits more than one run; allowed: first/u, second/u"):
        main.write_report(*runs, baseline="u")


def test_label_and_architecture_come_from_the_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "u")
    config = json.loads((run / "config.json").read_text()) | {"label": "600k"}
    config["model"]["embedding_type"] = "positional"
    (run / "config.json").write_text(json.dumps(config))
    assert load_run(run).label == "U-DDPM++ (600k)"


# -------------------------------------------------------------------------------------------------------------- errors


def damage(run: Path, file: str, content: str | bytes) -> None:
    (run / file).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_config(run: Path, **sections: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | sections))


ERRORS: dict[str, tuple[Any, str]] = {
    "no folder": (lambda u: shutil.rmtree(u), "no config.json; a RUN is a --workdir"),
    "not evaluated": (
        lambda u: (u / "eval" / "metrics.json").unlink(),
        "run --mode eval first: python main.py --config=... --workdir=",
    ),
    "damaged config": (lambda u: damage(u, "config.json", '{\n"data": {\n'), "config.json is damaged: "),
    "damaged metrics": (lambda u: damage(u, "eval/metrics.json", b"\xff"), "metrics.json is damaged: "),
    "truncated log": (
        lambda u: damage(u, "metrics.jsonl", '{"step": 1, "dsm": 2}\n{"step": 2, "ds'),
        "metrics.jsonl is damaged: ",
    ),
    "log of lists": (lambda u: damage(u, "metrics.jsonl", '{"step": 1}\n[1]\n'), "metrics.jsonl is damaged: JSON obj"),
    "no data set": (lambda u: edit_config(u, data={}), "config.json: not the config of a run, KeyError('dataset')"),
    "damaged samples": (lambda u: damage(u, "eval/samples.npz", b"PK\x03\x04 no archive"), "samples.npz is missing or"),
    "objects": (
        lambda u: np.savez(u / "eval" / "nll.npz", nll_bits_per_dim=np.array([None])),
        "nll.npz is missing or damaged",
    ),
    "other arrays": (lambda u: np.savez(u / "eval" / "nll.npz", nll=np.zeros(3)), "nll.npz: no array nll_bits_per_dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_damaged_run_is_one_line(tmp_path: Path, name: str) -> None:
    spoil, message = ERRORS[name]
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    spoil(bad)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main.write_report(good, bad)
    assert message in str(error.value) and str(bad) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.md").exists()


def test_wrong_arguments(digits: tuple[Path, ...], tmp_path: Path) -> None:
    u, qc, _ = digits
    occupied = tmp_path / "file"
    occupied.touch()
    for runs, options, message in (
        ([], {}, "no RUN is given"),
        ([u, qc, tmp_path / "qc" / ".." / "u"], {}, "the run is given twice"),
        ([u, qc], {"baseline": "c"}, "--baseline='c' is not among the runs; allowed: u, qc"),
        ([u], {"output": occupied}, "is a file; a folder is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            main.write_report(*runs, **options)
    assert not (tmp_path / "report.md").exists()
