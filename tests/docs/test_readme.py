"""The documents: commands start; flags, configs, files and links that they name exist; Python code runs."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import ROOT, blocks, command_problem, commands, problems, run_program, shell_commands
from PIL import Image

# ml_collections loads config files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

README = (ROOT / "README.md").read_text()
DOCUMENTS = {ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")}
DOCUMENTS -= {ROOT / "docs" / "extending.md"}  # test_extending.py
CONFIGS = [path for path in ROOT.glob("configs/**/*.py") if re.search("^(def )?get_config\\b", path.read_text(), re.M)]
CONFIGS.remove(ROOT / "configs" / "stored.py")


@pytest.mark.parametrize("document", sorted(DOCUMENTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    assert problems(document.read_text(), document.parent) == []


def test_one_version() -> None:
    files = {"pyproject.toml": '\nversion = "(.*)"', "CITATION.cff": "\nversion: (.*)", "README.md": "version = {(.*)}"}
    assert len({re.search(pattern, (ROOT / name).read_text())[1] for name, pattern in files.items()}) == 1


def test_results_on_digits_are_those_of_the_model_cards() -> None:
    """Of U and QC, whose cards in pretrained/ have every digit."""
    names = ("nll_bits_per_dim", "asym", "nasym", "fid", "inception_score", "precision", "recall")
    for model, folder in (("U", "digits_u"), ("QC", "digits_qc")):
        card = dict(
            re.findall(r"^\| (\w+) \| ([\d.e+-]+) \|$", (ROOT / "pretrained" / folder / "README.md").read_text(), re.M)
        )
        [row] = re.findall(rf"^\| {model}, (?:\d+ \+ )?\d+ steps.*?\| (.*) \|$", README, re.M)
        *cells, nfe = row.split(" | ")
        assert nfe == f"{card['nfe_sampling']} / {card['nfe_likelihood']}"
        for name, cell in zip(names, cells, strict=True):
            of_card = (name, f"{name}_se") if "±" in cell else (name,)
            for key, shown in zip(of_card, cell.split(" ± "), strict=True):
                digits = len(shown.partition("e")[0].partition(".")[2])
                exponent = int(shown.partition("e")[2] or 0)
                assert shown.partition("e")[0] == f"{float(card[key]) / 10**exponent:.{digits}f}", (key, shown)


def test_launch_commands_of_configs_start() -> None:
    found = [[*shell_commands(ast.get_docstring(ast.parse(path.read_text())))] for path in CONFIGS]
    assert len(found) > 50 and all(found)
    assert [problem for one in found for command in one if (problem := command_problem(command))] == []


def test_commands_of_make_start() -> None:
    run = subprocess.run(["make", "-n", "demo", "figures", "wasserstein"], cwd=ROOT, capture_output=True, text=True)
    made = [*shell_commands(run.stdout)]
    assert len(made) > 15
    assert [problem for command in made if (problem := command_problem(command))] == []


@pytest.mark.parametrize("version", ["(3, 9)", "(3, 14)"])
def test_another_python_is_refused_in_one_line_before_anything_is_installed(tmp_path: Path, version: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n""")
    python.chmod(0o755)
    made = ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    outside_make = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(made, cwd=ROOT, env=outside_make, capture_output=True, text=True)
    line, last = run.stderr.splitlines()
    assert run.returncode and line.startswith(f"error: {python} is Python 3.") and "make: ***" in last
    assert line.endswith("; 3.10 to 3.13 are supported: make PYTHON=python3.12 …") and not (tmp_path / "venv").exists()


def test_first_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    forget_accelerator: Callable[[], None],
) -> None:
    """Train, evaluate, sample and report as in the README, in small; then its Python code on the run that they made.
    Every command first says what it does, of what size, where and into which folder; last what it wrote, and what is
    usually next."""
    caplog.set_level(logging.INFO)
    small = ("training.n_iters=2", "training.batch_size=8", "training.snapshot_sampling=False", "sampling.num_steps=2")
    small += ("eval.enable_sampling=False", "eval.nll_images=2", "eval.asym_images=2", "eval.asym_levels=1")
    small += ("sampling.num_samples=4", "likelihood.num_steps=4", "model.nf=8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    forget_accelerator()
    section = README.partition("## Train, evaluate, sample")[2].partition("##")[0]
    *steps, report = commands(section)
    for step, size, then in zip(
        steps,
        ("step 0 to 2 of 8 items of digits", "bits/dim of 2 test images, asymmetry of 2 of them", "4 samples by PC,"),
        ("main.py --workdir={} --mode=eval", "-m report.main {}", "main.py --workdir={} --mode=eval"),
        strict=True,
    ):
        caplog.clear()
        run_program([*step[1:], *(f"--config.{override}" for override in small)], only_parse=False)
        said = [record.getMessage() for record in caplog.records if record.filename in ("runtime.py", "main.py")]
        assert size in said[0] and re.search(r"[\d,]{4,} parameters", said[0])
        where = r"\non cpu, \d+ thread\(s\)(, other work on \d+ of \d+ cores)?, fp32; writes to runs/digits/u"
        assert re.search(where, said[0])
        assert caplog.messages[0] == said[0]
        data = "\ndigits: 1437 training and 360 test images of 10 classes"
        assert said[0].endswith(data) or "--mode=sample" in step
        assert re.fullmatch(rf"written: runs/digits/u/.*; next: python {then.format('runs/digits/u')}", said[-1])
    caplog.clear()
    shared = f"--checkpoint={ROOT}/pretrained/digits_u"
    sample = ["main.py", "--mode=sample", shared, "--workdir=runs/samples", "--config.sampling.num_steps=2"]
    run_program([*sample, "--config.sampling.num_samples=1"], only_parse=False)
    (then,) = re.findall("; next: python (.*)", caplog.text)
    assert then == f"main.py --workdir=runs/samples --mode=eval {shared}"
    run_program(then.split(), only_parse=True)
    caplog.clear()
    with monkeypatch.context() as patched:  # a workdir that is not written has no config to go on with
        patched.setattr("run_lib.dry_run", lambda *run: {})
        run_program([*steps[0][1:], "--dry_run"], only_parse=False)
    assert "written: nothing; the same command without --dry_run trains" in caplog.text
    caplog.clear()
    run_program(report[1:], only_parse=False)
    assert re.fullmatch(r"From evaluated runs.*\non cpu.*; writes to runs/report", caplog.messages[0])
    assert any(re.match("written to runs/report: .*report.md", message) for message in caplog.messages)
    assert (tmp_path / "runs" / "report" / "report.md").exists()

    (block,) = blocks(README, "python")
    names: dict = {}
    capsys.readouterr()
    exec(block, names)
    assert capsys.readouterr().out.count("tensor([") == 2
    x, t = names["x"], torch.full((16,), 0.5)
    assert x.shape == names["score"](x, t).shape == (16, 1, 8, 8)
    (block,) = blocks((ROOT / "docs" / "evaluation.md").read_text(), "python")
    Image.new("RGB", (9, 7), (12, 12, 12)).save("IMAGE.png")
    exec(block.replace("runs/mine", "runs/digits/u"), {})
    assert re.fullmatch(r"tensor\(\[[\d.]+\], dtype=torch.float64\)\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](docs/deviations.md#nowhere)", "deviations.md#nowhere: no such file or heading"),
        ("`nowhere.py`", "nowhere.py: no such file"),
        ("| `nowhere/` |", "nowhere/: no such folder"),
        ("| `configs/digits.py:u`, `:v` |", "allowed are u, c, qc"),
        ("`make nothing`", "no such target: nothing"),
        ("```\npython nowhere.py\n```", "no such file: nowhere.py"),
        ("`python -m gaussian_example.nowhere --workdir=W`", "No module named gaussian_example.nowhere"),
        ("`python main.py --mode=trian …`", "<train|eval|sample|"),
        ("`python main.py --config.training.qc_wieght=1 …`", "no field"),
        ("`python main.py --config.sampling.method=odd …`", "sampling.method='odd'"),
        ("`python -m report.main --ouput=DIR RUN`", "Unknown command line flag 'ouput'"),
        ("`srun torchrun --nproc_per_node=2 main.py --precison=bf16 …`", "precison"),
        ("`accelerate launch --num_proceses=2 main.py …`", "num_proceses"),
        ("```\nfor w in 1 x; do\n  python main.py --config.optim.lr=$w --config.optim.lrr=$w …\ndone\n```", "no field"),
        ("`--config.training.qc_wieght`", "no such flag: --config.training.qc_wieght"),
        ("`python -m autoencoder_example.main --workdir=W`, `--sedes=N`", "no such flag: --sedes=N"),
    ],
    ids=lambda value: value[:40],
)
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    """The check of the documents can fail, in every way that it is for."""
    (found,) = problems(text, ROOT)
    assert problem in found
