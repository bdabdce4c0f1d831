"""The paper's numbers next to ours: only where the setting is the paper's, and every setting that is not is named."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import make_run

from report import main
from report.paper import PAPER, differing_settings
from report.runs import dataset_key, load_run, load_runs

# What an evaluation by the paper's protocol writes into metrics.json.
PROTOCOL = {
    "checkpoint_step": 700_000,
    "likelihood": "rademacher divergence, rk45, rtol 0.001, atol 1e-05",
    "nll_images": 10_000,
    "test_images": 10_000,
    "asym_levels": 100,
    "asym_first_level": 0,
    "sampler": "PC, reverse_diffusion + langevin (snr 0.16), 1000 steps",
    "sampling_steps": 1000,
    "nfe_sampling": 2001,
    "num_samples": 50_000,
    "features": "inception",
    "num_reference": 50_000,
}


def paper_run(
    path: Path, model: str, overrides: dict[str, Any] | None = None, *, dataset: str = "cifar10", **changes: Any
) -> Path:
    """A run of a config of configs/qcsbm, evaluated by the paper's protocol, with changes to its metrics."""
    config = importlib.import_module(f"configs.qcsbm.{dataset}").get_config(model)
    config.update_from_flattened_dict(overrides or {})
    run = make_run(path, **(PROTOCOL | changes))
    (run / "config.json").write_text(config.to_json())
    first = 600_050 if model.startswith("qc") else 50
    log = [{"step": first + 50 * k, "dsm": 1.0} for k in range(9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return run


def text_of(*paths: Path) -> str:
    """The part about the paper's tables."""
    return "".join(main.report_text(load_runs(paths)).partition("# Tables 2 and 3 of the paper")[1:])


def rows(text: str, caption: str) -> list[list[str]]:
    """The cells of the table under a caption, heading first."""
    lines = text.split(caption)[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


@pytest.mark.parametrize("dataset", PAPER)
@pytest.mark.parametrize(
    ("model", "tables"), [("u", {2, 3}), ("c", {2, 3}), ("qc", {2}), ("qc_sampling", {3})], ids=lambda value: str(value)
)
def test_our_configs_have_the_setting_of_the_paper(tmp_path: Path, dataset: str, model: str, tables: set[int]) -> None:
    run = load_run(paper_run(tmp_path / "run", model, dataset=dataset))
    assert dataset_key(run.dataset) == dataset
    assert {table for table in (2, 3) if not differing_settings(run, table)} == tables


def test_table_2_has_the_paper_next_to_ours(tmp_path: Path) -> None:
    runs = [paper_run(tmp_path / model, model) for model in ("c", "u", "qc")]
    text = text_of(*runs)
    ours = ["3.000 ± 0.010", "(2.00 ± 0.10)e8", "0.00200 ± 0.00010"]
    assert rows(text, "Table 2: likelihood and asymmetry.") == [
        ["Data set", "Model (run)", "NLL ↓ (bits/dim)", "paper", "Asym ↓", "paper", "NAsym ↓", "paper"],
        ["CIFAR10", "C-NCSN++ (c)", ours[0], "5.91", ours[1], "0", ours[2], "0"],
        ["CIFAR10", "U-NCSN++ (u)", ours[0], "3.46", ours[1], "1.88e8", ours[2], "1.90e-3"],
        ["CIFAR10", "QC-NCSN++ (qc, λ = 0.0001)", ours[0], "3.38", ours[1], "3.49e7", ours[2], "8.41e-4"],
    ]
    assert "- U-NCSN++ (u): the same setting." in text
    assert "arXiv 2209.12753" in text


def test_table_3_has_both_counts_of_network_evaluations(tmp_path: Path) -> None:
    """The QC run has Table 2's probes and batch, so that its numbers of Table 3 stand in parentheses."""
    text = text_of(paper_run(tmp_path / "u", "u"), paper_run(tmp_path / "qc", "qc"))
    header, u, qc = rows(text, "Table 3: quality of samples of the PC sampler.")
    assert header[2:6] == ["Predictor steps (paper: 1000)", "Network evaluations", "FID ↓", "paper"]
    assert u[2:] == ["1000", "2001", "5.25", "2.50", "8.5", "9.58", "0.61", "0.67", "0.55", "0.60"]
    assert qc[2:] == ["1000", "2001", "5.25", "(2.48)", "8.5", "(9.70)", "0.61", "(0.67)", "0.55", "(0.60)"]
    settings = "Table 3: training.batch_size 8 (paper: 128); training.qc_probes 16 (paper: 1)."
    assert f"- QC-NCSN++ (qc, λ = 0.0001): {settings}" in text


@pytest.mark.parametrize(
    ("tables", "model", "overrides", "changes", "message"),
    [
        ((2, 3), "u", {"model.nf": 32}, {}, "model.nf 32 (paper: 128)"),
        ((2, 3), "u", {"model.ch_mult": (1, 2)}, {}, "model.ch_mult 1, 2 (paper: 1, 2, 2, 2)"),
        ((2, 3), "u", {"model.schedule": "constant"}, {}, "model.schedule constant (paper: geometric)"),
        ((2, 3), "u", {"optim.lr": 1e-3}, {}, "optim.lr 0.001 (paper: 0.0002)"),
        ((2, 3), "u", {"training.reduce_mean": True}, {}, "training.reduce_mean True (paper: False)"),
        ((2, 3), "u", {"data.uniform_dequantization": True}, {}, "data.uniform_dequantization True (paper: False)"),
        ((2, 3), "c", {"training.batch_size": 64}, {}, "training.batch_size 64 (paper: 128)"),
        ((2, 3), "u", {}, {"checkpoint_step": 5000}, "step evaluated 5000 (paper: 700000)"),
        ((2, 3), "qc", {"training.qc_weight": 0.04}, {}, "training.qc_weight 0.04 (paper: 0.0001)"),
        ((2, 3), "qc", {"training.qc_stride": 4}, {}, "training.qc_stride 4 (paper: 1)"),
        ((2,), "u", {}, {"nll_images": 100}, "test images for NLL 100 (paper: all)"),
        ((2,), "u", {}, {"likelihood": "rk45, 1e-5"}, "likelihood rk45, 1e-5 (paper: rk45, rtol 0.001, atol 1e-05)"),
        ((2,), "u", {}, {"asym_levels": 20}, "noise levels of Asym 20 (paper: 100)"),
        ((2,), "u", {}, {"asym_first_level": 1}, "first noise level of Asym 1 (paper: 0)"),
        ((3,), "u", {}, {"num_samples": 1000}, "samples 1000 (paper: 50000)"),
        ((3,), "u", {}, {"num_reference": 10_000}, "images compared with 10000 (paper: 50000)"),
        ((3,), "u", {}, {"features": "inception-12345678"}, "features inception-12345678 (paper: inception)"),
        ((3,), "u", {}, {"features": "classifier-x"}, "features classifier-x (paper: inception)"),
        ((3,), "u", {}, {"sampler": "PC, reverse_diffusion + none, 1000 steps"}, "sampler PC, reverse_diffusion"),
    ],
)  # fmt: skip
def test_every_setting_that_differs_is_named(
    tmp_path: Path, tables: tuple[int, ...], model: str, overrides: dict, changes: dict, message: str
) -> None:
    run = load_run(paper_run(tmp_path / "run", model, overrides, **changes))
    for table in (2, 3):
        found = [text for text in differing_settings(run, table) if text.startswith(message)]
        assert len(found) == (table in tables)


@pytest.mark.parametrize(
    ("likelihood", "differs"),
    [
        ("rademacher divergence, adams in ln(σ/α), 160 steps", True),
        ("rademacher divergence, rk45, rtol 0.001, atol 1e-05", False),
        ("rademacher divergence, adams in ln(σ/α), 40 steps", True),
        ("rademacher divergence, adams, 160 steps", True),
    ],
)
def test_solvers_other_than_the_paper_s_are_named(tmp_path: Path, likelihood: str, differs: bool) -> None:
    run = load_run(paper_run(tmp_path / "run", "u", {}, likelihood=likelihood))
    assert any(text.startswith("likelihood") for text in differing_settings(run, 2)) is differs


def test_protocols_of_what_was_not_computed_do_not_count(tmp_path: Path) -> None:
    changes = dict(nll_bits_per_dim=None, nll_images=None, likelihood=None, asym=None, asym_levels=None)
    assert differing_settings(load_run(paper_run(tmp_path / "run", "u", **changes)), 2) == []


def test_where_qc_started_is_read_from_the_log(tmp_path: Path) -> None:
    """Logged every 50 steps, a run that continues step 600 000 has its first row at 600 050."""
    run = paper_run(tmp_path / "qc", "qc")
    for first, message in (
        (600_100, ["first step of QC 600050 (paper: 600000)"]),
        (600_050, []),
        (50, ["first step of QC 0 (paper: 600000)"]),
    ):
        (run / "metrics.jsonl").write_text(json.dumps({"step": first, "dsm": 1.0}))
        assert differing_settings(load_run(run), 2) == message
    (run / "metrics.jsonl").unlink()
    assert differing_settings(load_run(run), 2) == ["first step of QC not recorded (paper: 600000)"]


def test_table_3_is_of_the_pc_sampler(tmp_path: Path) -> None:
    ode = dict(sampler="ODE, rk45, rtol 1e-05, atol 1e-05", sampling_steps=None, nfe_sampling=143.5)
    text = text_of(paper_run(tmp_path / "pc", "u"), paper_run(tmp_path / "ode", "u", **ode))
    assert [row[1] for row in rows(text, "Table 3")[1:]] == ["U-NCSN++ (pc)"]


@pytest.mark.parametrize(
    ("dataset", "nll"),
    [("svhn", "5.00"), ("cifar100", "5.34"), ("imagenet32", "5.10"), ("ImageNet-32x32", "5.10"), ("cifar-10", "5.91")],
)
def test_data_sets_of_the_paper(tmp_path: Path, dataset: str, nll: str) -> None:
    """Tiny runs of bare configs: all of the paper's numbers in parentheses, CIFAR-100 and SVHN without Table 3."""
    text = text_of(make_run(tmp_path / "c", "conservative", dataset=dataset))
    _, row = rows(text, "Table 2")
    assert [row[0], row[1], row[3], row[5]] == [dataset, "C-NCSN++ (c)", f"({nll})", "(0)"]
    assert ("Table 3:" in text.split("Settings")[0]) == (dataset not in ("svhn", "cifar100"))


def test_several_data_sets_share_the_tables(tmp_path: Path) -> None:
    text = text_of(*(make_run(tmp_path / name, dataset=name) for name in ("svhn", "digits", "CIFAR10")))
    assert [(row[0], row[3]) for row in rows(text, "Table 2")[1:]] == [("svhn", "(2.15)"), ("CIFAR10", "(3.46)")]
    assert "| digits " not in text


def test_a_set_the_paper_does_not_have(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "u"))
    assert text == ""


def test_the_paper_ranks_qc_above_u_above_c() -> None:
    """What the paper concludes from its tables holds for the numbers typed here."""
    assert set(PAPER) == {"cifar10", "imagenet32", "cifar100", "svhn"}
    for printed in PAPER.values():
        rows_ = {kind: {key: float(text) for key, text in row.items()} for kind, row in printed.items()}
        assert rows_["QC"]["nll_bits_per_dim"] < rows_["U"]["nll_bits_per_dim"] < rows_["C"]["nll_bits_per_dim"]
        for key in ("asym", "nasym"):
            assert 0 == rows_["C"][key] < rows_["QC"][key] < rows_["U"][key]
        if "fid" in rows_["U"]:
            assert rows_["QC"]["fid"] < rows_["U"]["fid"] < rows_["C"]["fid"]
