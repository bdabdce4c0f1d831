"""The documents: every command starts or runs, every flag, config, file and link that they name exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from documents import (
    ROOT,
    command_problem,
    commands,
    complete,
    is_ours,
    problems,
    python_arguments,
    run_program,
    shell_commands,
)

import run_lib
from data import sets

# ml_collections loads config files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.py") if "def get_config" in path.read_text())

# Programs whose commands run here in small, and what makes them small.
RUN_HERE = {
    "main.py": (),
    "report.py": (),
    "figure_index.py": (),
    "benchmarks.step_2d": ("--rounds=1",),
}
# The other programs: a make target runs them, or the test named here.
RUN_ELSEWHERE = {
    "schrodinger_bridge.main": "test_bridge_training.py::test_command",
    "schrodinger_bridge.compare": "test_bridge_training.py::test_comparison_of_algorithms",
    "tutorial_example.main": "test_tutorial_example.py::test_every_figure_in_small",
    "benchmarks.sampling": "benchmarks/test_benchmarks.py::test_benchmark_compares_samplers",
    "benchmarks.likelihood": "benchmarks/test_benchmarks.py::test_benchmark_of_likelihood",
    "benchmarks.qc_variance": "benchmarks/test_benchmarks.py::test_benchmark_of_the_variance",
    "benchmarks.data_pipeline": "benchmarks/test_benchmarks.py::test_benchmark_of_the_input",
    "benchmarks.startup": "benchmarks/test_benchmarks.py::test_benchmark_of_the_start",
    "benchmarks.training_step": "benchmarks/test_benchmarks.py::test_benchmark_of_the_training_step",
    "benchmarks.qc_precision": (
        "benchmarks/test_benchmarks.py::test_rounding_to_bfloat16_errs_more_than_to_tf32_and_that_more_than_float32"
    ),
    "2d_examples.main": "test_2d_examples.py::test_every_pair_resolves_and_trains",
    "torchrun": "test_several_processes.py::test_same_training",
    "accelerate": "test_several_processes.py::test_killed_evaluation_goes_on_under_another_launcher",
}


def made_commands() -> list[list[str]]:
    """What the make targets run in Python, from ``make -n``."""
    names = ["demo", "figures", "wasserstein"]
    done = subprocess.run(["make", "-n", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [command for command in shell_commands(done.stdout) if command[0] == ".venv/bin/python"]
    return [command for command in found if is_ours(command[1:])]


def program_of(arguments: list[str]) -> str:
    return arguments[1] if arguments[0] == "-m" else arguments[0]


# ----------------------------------------------------------------------------------------------------------- they exist


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    assert problems(document.read_text(), document.parent) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_launch_commands_of_configs_start(config: Path) -> None:
    found = list(shell_commands(ast.get_docstring(ast.parse(config.read_text()), clean=True)))
    assert found
    assert [problem for command in found if (problem := command_problem(command))] == []


def test_commands_of_make_start() -> None:
    made = made_commands()
    assert len(made) > 10
    assert [problem for command in made if (problem := command_problem(command))] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](docs/nowhere.md)", "docs/nowhere.md: no such file or heading"),
        ("![x](docs/figures/nowhere.png)", "docs/figures/nowhere.png: no such file"),
        ("[x](docs/deviations.md#nowhere)", "deviations.md#nowhere: no such file or heading"),
        ("[x](#nowhere)", "#nowhere: no such file or heading"),
        ("`nowhere.py`", "nowhere.py: no such file"),
        ("| `nowhere/` |", "nowhere/: no such folder"),
        ("`configs/digits.py:v`", "allowed are u, c, qc"),
        ("| `configs/digits.py:u`, `:v` |", "allowed are u, c, qc"),
        ("`make nothing`", "no such target: nothing"),
        ("```\npython nowhere.py\n```", "no such file: nowhere.py"),
        ("`python -m gaussian_example.nowhere --workdir=W`", "No module named gaussian_example.nowhere"),
        ("```\npython main.py --config=configs/digits.py:v --workdir=W --mode=train\n```", "config argument 'v'"),
        ("```\npython main.py --config=configs/digits.py --workdir=W --mode=trian\n```", "<train|eval|sample|"),
        ("`python main.py --config=configs/digits.py --workdir=W`", "--mode"),
        ("`python main.py --precison=bf16 …`", "precison"),
        ("`python main.py --config.training.qc_wieght=1 …`", "no field"),
        ("`python main.py --config.training.batch_size=many …`", "batch_size"),
        ("`python -m report.main --ouput=DIR RUN`", "Unknown command line flag 'ouput'"),
        ("`torchrun --nproc_per_nod=2 --n main.py …`", "nproc"),
        ("`torchrun --nproc_per_node=2 main.py --precison=bf16 …`", "precison"),
        ("`accelerate launch --num_proceses=2 main.py …`", "num_proceses"),
        ("`accelerate launch --num_processes=2 main.py --mode=x …`", "<train|eval|sample|"),
        ("`srun --nodes=2 torchrun --nnodes=2 nowhere.py`", "no such file: nowhere.py"),
        ("```\nfor w in 1 x; do\n  python main.py --config.optim.lr=$w --config.optim.lrr=$w …\ndone\n```", "no field"),
        ("`--config.training.qc_wieght`", "no such flag: --config.training.qc_wieght"),
        ("`--config.sampling.method=odd`", "sampling.method='odd'"),
        ("`--precison=bf16`", "precison"),
        ("`--sedes`", "no such flag: --sedes"),
        ("`python -m autoencoder_example.main --workdir=W`, `--sedes=N`", "no such flag: --sedes=N"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    """The check of the documents can fail, in every way that it is for."""
    (found,) = problems(text, ROOT)
    assert problem in found


def test_a_loop_is_read_with_its_first_value() -> None:
    text = (
        "```\nfor w in 1e-9 1e-2; do\n  FOO=1 python main.py --workdir=runs/$w \\\n    --mode=train  # why\ndone\n```"
    )
    assert commands(text) == [["python", "main.py", "--workdir=runs/1e-9", "--mode=train"]]


# ------------------------------------------------------------------------------------------------------------- they run


def test_every_command_runs_somewhere() -> None:
    """Here in small, by a make target with the same mode, or in the test that RUN_ELSEWHERE names."""
    made = {(program_of(command[1:]), *re.findall("--mode=[a-z]+", " ".join(command))) for command in made_commands()}
    for document in DOCUMENTS:
        for command in commands(document.read_text()):
            if command[0] == "make":
                continue
            arguments = python_arguments(command)
            program = program_of(arguments)
            mode = re.findall("--mode=[a-z]+", " ".join(command))
            if program in RUN_HERE and command[0].endswith("python"):
                continue
            launcher = program if command[0].endswith("python") else next(c for c in command if c in RUN_ELSEWHERE)
            assert not is_ours(arguments) or (program, *mode) in made or launcher in RUN_ELSEWHERE, command
    for place in RUN_ELSEWHERE.values():
        file, test = place.split("::")
        functions = [node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")]
        assert test in functions


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_weights: tuple[Path, str]) -> Path:
    """A folder that looks like the repository's, in which every experiment is small.

    Networks have 8 channels, training 4 steps with checkpoints at 2 and 4, whatever set is asked for a few images. A
    checkpoint to start from that full training would have written is that of step 2. Inception's weights are random.
    """
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    get_dataset = sets.get_dataset

    def few_images(config):
        train, test = get_dataset(config)
        train.images, train.labels = train.images[:40], train.labels[:40]
        test.images, test.labels = test.images[:9], test.labels[:9]
        return train, test

    def small(config):
        config.model.update(nf=8, num_res_blocks=1, ch_mult=tuple(config.model.ch_mult)[:2])
        config.training.update(batch_size=4, n_iters=4, log_freq=2, eval_freq=4, qc_probes=1)
        config.training.update(snapshot_freq=2, snapshot_freq_for_preemption=2, snapshot_sampling=False)
        config.sampling.num_steps = 2
        config.classifier.n_iters = 2
        config.likelihood.update(solver="heun", num_steps=2)
        config.eval.update(batch_size=16, num_samples=8, nll_images=3, asym_levels=2, asym_images=2, asym_probes=1)
        if config.training.init_from:
            start = Path(config.training.init_from)
            config.training.init_from = str(start.parent / "step_00000002.pt")
        if config.eval.features == "inception":
            config.eval.update(inception_path=str(inception_weights[0]), inception_sha256=inception_weights[1])
        if config.data.dataset != "digits":
            size, channels = config.data.image_size, config.data.num_channels
            config.data.update(dataset="npz", path=f"images_{size}_{channels}.npz")
            rng = np.random.default_rng(0)
            arrays = {f"{half}_images": rng.integers(0, 256, (20, size, size, channels), np.uint8) for half in HALVES}
            arrays |= {f"{half}_labels": np.arange(20) % 2 for half in HALVES}
            np.savez(config.data.path, **arrays)
        return config

    monkeypatch.setattr(sets, "get_dataset", few_images)
    for mode in ("train", "evaluate", "sample", "statistics", "train_classifier"):
        whole = getattr(run_lib, mode)

        def in_small(config, workdir, runtime, checkpoint=None, whole=whole):
            rest = [str(Path(checkpoint).parent / "step_00000002.pt")] if checkpoint else []
            return whole(small(config), workdir, runtime, *rest)

        monkeypatch.setattr(run_lib, mode, in_small)
    return tmp_path


HALVES = ("train", "test")


def test_commands_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], forget_accelerator: Callable[[], None]
) -> None:
    """`make demo`, then every command of the documents that RUN_HERE has, in the order of the page: each as it stands
    there, only the experiments are small."""
    to_run = [command for command in made_commands() if "runs/figures" not in " ".join(command)]
    to_run += [command for document in DOCUMENTS for command in commands(document.read_text())]
    done = []
    for command in to_run:
        arguments = None if command[0] not in ("python", ".venv/bin/python") else complete(command[1:])
        if arguments is None or program_of(arguments) not in RUN_HERE or arguments in done:
            continue
        forget_accelerator()
        try:
            run_program([*arguments, *RUN_HERE[program_of(arguments)]], only_parse=False)
        except SystemExit as end:
            pytest.fail(f"{shlex.join(command)}: {end.code}\n{capsys.readouterr().err[-2000:]}")
        done.append(arguments)
    forget_accelerator()
    assert {program_of(arguments) for arguments in done} >= {"main.py", "report.py"}
    # What the demo and the README's commands say they make.
    for run in ("runs/digits/u", "runs/digits/qc", "runs/digits/c"):
        assert json.loads((workplace / run / "eval" / "metrics.json").read_text())["num_samples"] == 8
    assert "QC-NCSN++" in (workplace / "runs/digits/report.md").read_text()
    assert "main" not in sys.modules or sys.modules["main"].__file__ != str(ROOT / "main.py")
