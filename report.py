"""From evaluated runs to the paper's tables and figures: ``python report.py RUN [RUN ...]``.

A run is a working directory of ``main.py`` that has been evaluated (``--mode eval``). The report puts runs of one
data set side by side in the form of Tables 2 and 3 and Figure 3 of Chao, Sun, Cheng and Lee, "On Investigating the
Conservative Property of Score-Based Generative Models" (ICML 2023, arXiv 2209.12753), the paper's numbers below ours.

Statistics. Every mean m over test images comes with its standard error s. Two runs a, b are compared by

    Δ = m_a − m_b,   s_Δ = √(s_a² + s_b²),                      the errors taken as independent, or
    Δ = mean(d),     s_Δ = std(d) / √N,   d_i = a_i − b_i,      paired, where per-image values exist.

Images are hard or easy for both models alike, so the paired s_Δ is the smaller one. A ratio r = m_a / m_b has
s_r = |r| √((s_a/m_a)² + (s_b/m_b)²) to first order. |Δ| < 2 s_Δ is reported as "cannot be told apart". All of these
errors are those of the test set; how much another training seed would change a number they do not say.

Files read from a run W: ``config.json``, ``eval/metrics.json`` (both required), ``metrics.jsonl``,
``eval/asymmetry.npz``, ``eval/samples.npz``, ``eval/nll.npz``. What one of the last four would have shown and cannot
is said in the report. Files written: ``report.md``, ``report.csv``, ``asymmetry_vs_t.png``, ``samples_same_seed.png``,
``training_curves.png``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMNS",
    "PAPER",
    "PAPER_SOURCE",
    "Column",
    "Run",
    "format_measurement",
    "load_run",
    "load_runs",
    "main",
    "tables_and_comparisons",
    "write_report",
]

# ------------------------------------------------------------------------------------------------ the paper's numbers

PAPER_SOURCE = (
    "Chao, Sun, Cheng and Lee, ICML 2023, arXiv 2209.12753. NLL, Asym and NAsym: Table 2 (QC: λ = 1e-4, K = 16 probes, "
    "batch 8). FID, IS, precision and recall: Table 3 (QC: λ = 1e-4, K = 1, batch 128; Inception features, 50 000 "
    "samples of the PC sampler). QC continues U from iteration 600 000 and is evaluated at 700 000. The paper counts "
    "predictor steps as NFE; the NFE of our runs are network evaluations."
)

_TABLE_2 = ("nll_bits_per_dim", "asym", "nasym")
_TABLE_3 = ("fid", "inception_score", "precision", "recall", "nfe_sampling")


def _paper_row(table_2: tuple[float, ...], table_3: tuple[float, ...] = ()) -> dict[str, float]:
    row = dict(zip(_TABLE_2, table_2, strict=True))
    return row | (dict(zip(_TABLE_3, (*table_3, 1000), strict=True)) if table_3 else {})


# data set → model (C, U, QC) → metric, named as in eval/metrics.json.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "C": _paper_row((5.91, 0.0, 0.0), (10.97, 8.58, 0.61, 0.58)),
        "U": _paper_row((3.46, 1.88e8, 1.90e-3), (2.50, 9.58, 0.67, 0.60)),
        "QC": _paper_row((3.38, 3.49e7, 8.41e-4), (2.48, 9.70, 0.67, 0.60)),
    },
    "imagenet32": {
        "C": _paper_row((5.10, 0.0, 0.0), (28.97, 8.58, 0.61, 0.45)),
        "U": _paper_row((3.96, 2.05e7, 7.17e-4), (19.82, 9.89, 0.60, 0.52)),
        "QC": _paper_row((3.83, 1.13e7, 5.47e-4), (19.62, 9.94, 0.61, 0.52)),
    },
    "cifar100": {
        "C": _paper_row((5.34, 0.0, 0.0)),
        "U": _paper_row((3.50, 2.98e8, 2.25e-3)),
        "QC": _paper_row((3.44, 9.31e7, 1.44e-3)),
    },
    "svhn": {
        "C": _paper_row((5.00, 0.0, 0.0)),
        "U": _paper_row((2.15, 3.06e7, 6.54e-4)),
        "QC": _paper_row((2.01, 1.69e7, 4.80e-4)),
    },
}


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        key: the metric's name in ``eval/metrics.json``; its standard error, where there is one, is ``key + "_se"``.
        title: the heading, with the unit.
        best: ``min`` or ``max``, or ``None`` where no value is better than another.
        from_features: whether the number depends on the feature extractor and on the number of samples.
        paper_format: how the paper prints it.
    """

    key: str
    title: str
    best: Callable[..., Any] | None = None
    from_features: bool = False
    paper_format: str = ".2f"


# NFE is not ranked: an evaluation of a conservative score costs a forward and a backward pass, one of the others only
# a forward pass, so that the smaller count need not be the cheaper one.
COLUMNS = (
    Column("nll_bits_per_dim", "NLL ↓ (bits/dim)", min),
    Column("asym", "Asym ↓", min, paper_format=".2e"),
    Column("nasym", "NAsym ↓", min, paper_format=".2e"),
    Column("fid", "FID ↓", min, from_features=True),
    Column("kid", "KID ↓", min, from_features=True),
    Column("inception_score", "IS ↑", max, from_features=True),
    Column("precision", "Precision ↑", max, from_features=True),
    Column("recall", "Recall ↑", max, from_features=True),
    Column("nfe_sampling", "NFE sampling", paper_format=".0f"),
    Column("nfe_likelihood", "NFE likelihood"),
    Column("num_samples", "Samples"),
    Column("checkpoint_step", "Step"),
)
_WITH_ERROR = ("nll_bits_per_dim", "asym", "nasym", "kid")
_NUMBERS = (*(c.key for c in COLUMNS), *(f"{key}_se" for key in _WITH_ERROR), "feature_test_accuracy")

# In single precision J − Jᵀ of an exactly conservative score is round-off: about 1e-7 of J, times what the depth of
# the network adds. NAsym is the square of such a ratio; 1e-8 is a relative asymmetry of 1e-4.
NASYM_ROUND_OFF = 1e-8

# ------------------------------------------------------------------------------------------------------- reading a run


@dataclass(frozen=True)
class Run:
    """An evaluated working directory.

    Attributes:
        path: the folder; ``name``: what the report calls it, unique within one report.
        kind: "U" (unconstrained), "C" (conservative) or "QC" (unconstrained with ``qc_weight`` > 0).
        architecture: "NCSN++" and so on, from ``config.model.name``; empty where the config has none.
        dataset: ``config.data.dataset``, for images of one's own with the name of their file or folder.
        qc_weight: λ.
        config: ``config.json``; ``metrics``: ``eval/metrics.json``; ``log``: the rows of ``metrics.jsonl`` in the order
        of their steps, ``None`` where there is no such file.
        asymmetry: arrays t, sigma, asym, asym_se, nasym, nasym_se (T,), or ``None``.
        samples: float64 images (N, H, W, C) in [0, 1], or ``None``.
        nll: bits/dim of each test image (N,), or ``None``.
    """

    path: Path
    name: str
    kind: str
    architecture: str
    dataset: str
    qc_weight: float
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, Any]] | None
    asymmetry: dict[str, np.ndarray] | None
    samples: np.ndarray | None
    nll: np.ndarray | None

    @property
    def model(self) -> str:
        """The model as the paper names it, e.g. "QC-NCSN++"."""
        return f"{self.kind}-{self.architecture}" if self.architecture else self.kind

    @property
    def label(self) -> str:
        """Model and run, e.g. "QC-NCSN++ (qc, λ = 1e-4)"."""
        weight = f", λ = {_short(self.qc_weight)}" if self.kind == "QC" else ""
        return f"{self.model} ({self.name}{weight})"

    def number(self, key: str) -> float | None:
        """A number of ``eval/metrics.json``; ``None`` where it was not computed."""
        return self.metrics[key]

    def error(self, key: str) -> float | None:
        """The standard error of the metric ``key``; ``None`` where it has none or it is not finite."""
        value = self.metrics[f"{key}_se"] if key in _WITH_ERROR else None
        return value if value is not None and math.isfinite(value) else None

    @property
    def asym_is_round_off(self) -> bool:
        """Whether Asym and NAsym are zero as far as single precision can tell (NAsym below ``NASYM_ROUND_OFF``)."""
        nasym = self.number("nasym")
        return nasym is not None and abs(nasym) < NASYM_ROUND_OFF


def load_run(path: Path, name: str | None = None) -> Run:
    """Reads the working directory ``path``; see the module's docstring for its files.

    Args:
        name: what the report calls the run; without it ``config.label``, else the folder's name.

    Raises:
        FileNotFoundError: no such folder, no ``config.json``, or not evaluated yet.
        ValueError: a damaged file, or one whose content is not what it has to be; the message names file and line.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; a RUN is a --workdir of main.py")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; a RUN is a --workdir of main.py")
    if not (path / "eval" / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{path}: no eval/metrics.json; run --mode eval first: "
            f"python main.py --config=... --workdir={path} --mode eval"
        )
    config = _read_object(path / "config.json")
    parameterization = _field(config, "model.parameterization", path, str)
    if parameterization not in ("unconstrained", "conservative"):
        raise ValueError(
            f"{path / 'config.json'}: config.model.parameterization={parameterization!r}; "
            "allowed: 'unconstrained', 'conservative'"
        )
    qc_weight = float(_field(config, "training.qc_weight", path, (int, float)))
    _field(config, "data.dataset", path, str)
    own = config["data"].get("path")
    return Run(
        path=path,
        name=name or str(config.get("label") or path.resolve().name),
        kind="C" if parameterization == "conservative" else "QC" if qc_weight > 0 else "U",
        architecture=_architecture(config["model"]),
        dataset=config["data"]["dataset"] + (f" ({Path(own).name})" if own else ""),
        qc_weight=qc_weight,
        config=config,
        metrics=_read_metrics(path / "eval" / "metrics.json"),
        log=_read_log(path / "metrics.jsonl"),
        asymmetry=_read_asymmetry(path / "eval" / "asymmetry.npz"),
        samples=_read_samples(path / "eval" / "samples.npz"),
        nll=_read_nll(path / "eval" / "nll.npz"),
    )


def _architecture(model: dict[str, Any]) -> str:
    name = str(model.get("name") or "")
    if name.lower() != "ncsnpp":
        return name
    # One network under one name; the time embedding is what the published configs of the two differ in.
    return "DDPM++" if model.get("embedding_type") == "positional" else "NCSN++"


def _field(config: dict[str, Any], dotted: str, path: Path, kinds: type | tuple[type, ...]) -> Any:
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path / 'config.json'}: config.{dotted} is missing")
        value = value[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{path / 'config.json'}: config.{dotted}={value!r} is not of the right type")
    return value


def _parse_object(text: str, file: Path, first_line: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{file}, line {line}: damaged JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}, line {first_line}: a JSON object is needed, not {type(value).__name__}")
    return value


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: damaged JSON (not UTF-8 text)") from error


def _read_object(file: Path) -> dict[str, Any]:
    return _parse_object(_read_text(file), file, first_line=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_metrics(file: Path) -> dict[str, Any]:
    metrics = _read_object(file)
    for key in _NUMBERS:
        value = metrics.setdefault(key, None)
        if value is not None and not _is_number(value):
            raise ValueError(f"{file}: {key}={value!r}; a number or null is needed")
    for key in ("features", "sampler"):
        value = metrics.setdefault(key, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{file}: {key}={value!r}; a string or null is needed")
    return metrics


def _read_log(file: Path) -> list[dict[str, Any]] | None:
    if not file.is_file():
        return None
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_object(line, file, first_line=number)
        for key in ("step", "dsm", "qc", "eval_loss"):
            if row.get(key) is not None and not _is_number(row[key]):
                raise ValueError(f"{file}, line {number}: {key}={row[key]!r}; a number or null is needed")
        if row.get("step") is None:
            raise ValueError(f"{file}, line {number}: the row has no step")
        # A run that was killed repeats the steps after its last checkpoint; the weights evaluated came of the repeat.
        rows[row["step"], "eval_loss" in row] = row
    return [rows[key] for key in sorted(rows)]


def _read_arrays(file: Path, *names: str) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("a lone array")
            return {name: archive[name] for name in names}
    except KeyError as error:
        raise ValueError(f"{file}: it must hold the arrays {', '.join(names)} ({error.args[0]})") from error
    # RuntimeError: what zipfile says of encrypted entries and of later versions of its format.
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{file}: damaged, or not a .npz archive of plain arrays") from error


def _read_asymmetry(file: Path) -> dict[str, np.ndarray] | None:
    arrays = _read_arrays(file, "t", "sigma", "asym", "asym_se", "nasym", "nasym_se")
    if arrays is not None and {a.shape for a in arrays.values()} != {(max(arrays["t"].size, 1),)}:
        raise ValueError(f"{file}: its arrays must all have one shape (T,); found {[a.shape for a in arrays.values()]}")
    return arrays


def _read_samples(file: Path) -> np.ndarray | None:
    arrays = _read_arrays(file, "images", "num_levels")
    if arrays is None:
        return None
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{file}: images must be uint8 (N, H, W, 1 or 3); found {images.dtype} {images.shape}")
    top = int(arrays["num_levels"]) - 1
    if not images.max() <= top <= 255:
        raise ValueError(f"{file}: num_levels={top + 1} does not fit the largest pixel level {images.max()}")
    return images / max(top, 1)


def _read_nll(file: Path) -> np.ndarray | None:
    arrays = _read_arrays(file, "nll_bits_per_dim")
    if arrays is None:
        return None
    nll = arrays["nll_bits_per_dim"].astype(np.float64)
    if nll.ndim != 1 or nll.size == 0:
        raise ValueError(f"{file}: nll_bits_per_dim must have the shape (N,); found {nll.shape}")
    return nll


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs of one data set, under names that tell them apart.

    Raises:
        FileNotFoundError, ValueError: see ``load_run``; also a run given twice and runs of different data sets.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]}: the run is given twice")
    runs = [load_run(path) for path in paths]
    for run in runs:
        for key in ("dataset", "path", "image_size"):
            first, other = runs[0].config["data"].get(key), run.config["data"].get(key)
            if first != other and not (key == "dataset" and _dataset_key(first) == _dataset_key(other)):
                raise ValueError(
                    f"runs of different data sets cannot share a table: config.data.{key}={first!r} in "
                    f"{runs[0].path}, {other!r} in {run.path}"
                )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        # Equal labels or folder names: the paths below the common folder are what tells the runs apart.
        common = os.path.commonpath(resolved)
        runs = [load_run(path, os.path.relpath(full, common)) for path, full in zip(paths, resolved, strict=True)]
    return runs


def _dataset_key(dataset: str) -> str:
    """The name without case and punctuation; the paper's ImageNet-32x32 under one of its two spellings."""
    key = "".join(c for c in dataset.lower() if c.isalnum())
    return "imagenet32" if key == "imagenet32x32" else key


# ------------------------------------------------------------------------------------------------------------- numbers


def _plain_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def _short(value: float) -> str:
    """The shortest of the usual notations: "0.05", "1e-4"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:g}" if -3 < int(exponent) < 4 or value == 0 else f"{float(mantissa):g}e{int(exponent)}"


def format_measurement(value: float | None, error: float | None = None) -> str:
    """``value ± error`` with two digits of the error, e.g. "3.462 ± 0.011" or "(1.881 ± 0.012)e8"; "–" for ``None``."""
    if value is None:
        return "–"
    if not math.isfinite(value) or (value == 0 and not error):
        return f"{value:g}"
    exponent = math.floor(math.log10(max(abs(value), error or 0.0)))
    scientific = not -2 <= exponent < 4
    if not error:
        return _plain_exponent(f"{value:.2e}") if scientific else f"{value:.{max(2, 2 - exponent)}f}"
    scale = 10.0**exponent if scientific else 1.0
    decimals = min(max(0, 1 - math.floor(math.log10(error / scale))), 8)
    body = f"{value / scale:.{decimals}f} ± {error / scale:.{decimals}f}"
    return f"({body})e{exponent}" if scientific else body


def _format_count(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() or not math.isfinite(value) else f"{value:.1f}"


def _leaders(runs: Sequence[Run], column: Column) -> set[int]:
    """The indices of the runs whose value stands in bold.

    With standard errors: the best one, if more than two combined standard errors ahead of the runner-up. Without:
    the best and its equals, unless all are equal. Nothing to compare, nothing in bold.
    """
    values = {i: run.number(column.key) for i, run in enumerate(runs)}
    finite = {i: value for i, value in values.items() if value is not None and math.isfinite(value)}
    if column.best is None or len(finite) < 2:
        return set()
    if column.from_features and not _features_comparable(runs):
        return set()
    best, second = sorted(finite, key=finite.__getitem__, reverse=column.best is max)[:2]
    if any(runs[i].error(column.key) is not None for i in finite):
        errors = runs[best].error(column.key), runs[second].error(column.key)
        if None in errors or abs(finite[best] - finite[second]) <= 2 * math.hypot(*errors):
            return set()
        return {best}
    leaders = {i for i, value in finite.items() if value == finite[best]}
    return set() if len(leaders) == len(finite) else leaders


def _features_comparable(runs: Sequence[Run]) -> bool:
    """FID and its kin depend on the features, and their bias on the number of samples: both must be the same."""
    measured = [run for run in runs if any(run.number(c.key) is not None for c in COLUMNS if c.from_features)]
    return len({(run.metrics["features"], run.metrics["num_samples"]) for run in measured}) <= 1


# -------------------------------------------------------------------------------------------------------------- tables


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _our_table(runs: Sequence[Run]) -> str:
    cells: list[list[str]] = [[_escape(run.label)] for run in runs]
    for column in COLUMNS:
        leaders = _leaders(runs, column)
        for i, run in enumerate(runs):
            value = run.number(column.key)
            if column.best is None:
                text = _format_count(value)
            else:
                text = format_measurement(value, run.error(column.key))
            cells[i].append(f"**{text}**" if i in leaders else text)
    return _markdown_table(["Model (run)", *(c.title for c in COLUMNS)], cells)


def _table_notes(runs: Sequence[Run]) -> str:
    notes = [
        "± is one standard error over the test images (KID: over subsets of samples). **Bold** is the best value of a "
        "column: with standard errors only if it is more than two combined ones ahead of the runner-up, without (FID, "
        "IS, precision, recall) simply the best of one evaluation each. Asym = E[tr(JJᵀ) − tr(JJ)], NAsym = "
        "E[‖J − Jᵀ‖²/(4‖J‖²)], J the Jacobian of the score. NFE is the number of network evaluations; one of a "
        "conservative model costs a forward and a backward pass. – is not computed."
    ]
    samplers = {run.metrics["sampler"] or "not recorded" for run in runs}
    if len(samplers) == 1:
        notes.append(f"Sampler: {samplers.pop()}.")
    else:
        listed = "; ".join(f"{run.name}: {run.metrics['sampler'] or 'not recorded'}" for run in runs)
        notes.append(f"The runs were sampled differently ({listed}).")
    zero = [run for run in runs if run.asym_is_round_off]
    if zero:
        names, limit = ", ".join(run.label for run in zero), _plain_exponent(f"{NASYM_ROUND_OFF:.0e}")
        notes.append(f"Zero up to round-off (NAsym below {limit}): Asym and NAsym of {names}.")
    return "\n\n".join(notes)


def _features_note(runs: Sequence[Run]) -> str:
    notes = []
    if not _features_comparable(runs):
        listed = "; ".join(
            f"{run.name}: {run.metrics['features'] or 'not recorded'}, {_format_count(run.number('num_samples'))}"
            for run in runs
        )
        notes.append(
            "FID, KID, IS, precision and recall of these runs must not be compared with one another, and none is in "
            f"bold: features or number of samples differ ({listed})."
        )
    for features in sorted({run.metrics["features"] for run in runs if run.metrics["features"]} - {"inception"}):
        accuracies = sorted(
            {
                run.number("feature_test_accuracy")
                for run in runs
                if run.metrics["features"] == features and run.number("feature_test_accuracy") is not None
            }
        )
        listed = " or ".join(f"{100 * accuracy:.1f} %" for accuracy in accuracies)
        accuracy = f"its test accuracy is {listed}" if accuracies else "its test accuracy was not recorded"
        notes.append(
            f"FID, KID, IS, precision and recall come from the features of {features} ({accuracy}): they are "
            "comparable within this report only, not with Inception FID."
        )
    return "\n\n".join(notes)


def _paper_section(runs: Sequence[Run]) -> str:
    paper = PAPER.get(_dataset_key(runs[0].dataset))
    if paper is None:
        return f"The paper has no numbers for this data set ({runs[0].dataset})."
    kinds = [kind for kind in ("C", "U", "QC") if any(run.kind == kind for run in runs)]
    shown = [column for column in COLUMNS if any(column.key in paper[kind] for kind in kinds)]
    rows = []
    for kind in kinds:
        row = [f"{kind}-NCSN++ (paper)"]
        for column in shown:
            value = paper[kind].get(column.key)
            if value is None or value == 0:
                row.append("–" if value is None else "0")
            else:
                row.append(_plain_exponent(f"{value:{column.paper_format}}"))
        rows.append(row)
    titles = [c.title.replace("NFE sampling", "NFE (predictor steps)") for c in shown]
    return f"The paper's numbers for this data set:\n\n{_markdown_table(['Model', *titles], rows)}\n\n{PAPER_SOURCE}"


def _csv_text(runs: Sequence[Run]) -> str:
    """The table with every digit: repr of a float reads back as the very same float; an empty cell is not computed."""
    keys = [key for c in COLUMNS for key in (c.key, f"{c.key}_se") if key == c.key or c.key in _WITH_ERROR]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    descriptions = ("run", "model", "dataset", "qc_weight", "path", "sampler", "features")
    writer.writerow([*descriptions, *keys, "feature_test_accuracy"])
    for run in runs:
        described = [run.name, run.model, run.dataset, repr(run.qc_weight), str(run.path)]
        described += [run.metrics["sampler"] or "", run.metrics["features"] or ""]
        numbers = [run.metrics[key] for key in (*keys, "feature_test_accuracy")]
        writer.writerow([*described, *("" if value is None else repr(value) for value in numbers)])
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- comparisons


def _find_baseline(runs: Sequence[Run], name: str | None) -> Run | None:
    if name is None:
        return next((run for run in runs if run.kind == "U"), None)
    found = [run for run in runs if name in (run.name, run.path.resolve().name)]
    if len(found) != 1:
        problem = "is not among the runs" if not found else "fits more than one run"
        raise ValueError(f"--baseline={name!r} {problem}; allowed: {', '.join(run.name for run in runs)}")
    return found[0]


def _pairing(run: Run, baseline: Run) -> tuple[np.ndarray | None, str]:
    """Per-image differences (N,) in bits/dim, or ``None`` with the reason why the runs cannot be paired."""
    for each in (run, baseline):
        if each.nll is None:
            return None, f"unpaired: {each.name} has no eval/nll.npz"
        if not np.isclose(each.nll.mean(), each.number("nll_bits_per_dim"), rtol=1e-4, atol=1e-6):
            return None, f"unpaired: eval/nll.npz and eval/metrics.json of {each.name} are not of one evaluation"
    if run.nll.shape != baseline.nll.shape:
        return None, f"unpaired: {run.nll.size} and {baseline.nll.size} test images"
    return run.nll - baseline.nll, f"paired over {run.nll.size} test images"


def _compare_nll(run: Run, baseline: Run) -> str:
    ours, theirs = run.number("nll_bits_per_dim"), baseline.number("nll_bits_per_dim")
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return "NLL: not computed for both runs."
    differences, how = _pairing(run, baseline)
    errors = run.error("nll_bits_per_dim"), baseline.error("nll_bits_per_dim")
    if differences is not None and differences.size > 1:
        delta, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(differences.size))
    elif None not in errors:
        delta, error = ours - theirs, math.hypot(*errors)
    else:
        return f"NLL: ΔNLL = {ours - theirs:+.4f} bits/dim, without a standard error; nothing can be concluded ({how})."
    measured = f"ΔNLL = {_signed(delta, error)} bits/dim ({how})"
    if abs(delta) < 2 * error or delta == 0:
        return f"NLL: {measured}; the two cannot be told apart at two standard errors."
    return f"NLL: {measured}; {'lower (better)' if delta < 0 else 'higher (worse)'}{_by_errors(delta, error)}."


def _signed(delta: float, error: float) -> str:
    text = format_measurement(delta, error)
    return text if text.startswith(("-", "(")) or delta == 0 else f"+{text}"


def _by_errors(delta: float, error: float) -> str:
    return f" by {abs(delta) / error:.1f} standard errors" if error > 0 else ""


def _compare_ratio(run: Run, baseline: Run, key: str, title: str) -> str:
    ours, theirs = run.number(key), baseline.number(key)
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return f"{title}: not computed for both runs."
    if baseline.asym_is_round_off or theirs == 0:
        return f"{title}: no ratio, the baseline's is zero up to round-off."
    if run.asym_is_round_off:
        return f"{title}: zero up to round-off ({format_measurement(ours)}; baseline {format_measurement(theirs)})."
    errors = run.error(key), baseline.error(key)
    ratio = ours / theirs
    if None in errors:
        measured = f"{format_measurement(ratio)} times the baseline's"
        return f"{title}: {measured}, without a standard error; nothing can be concluded."
    relative = math.hypot(errors[0] / ours, errors[1] / theirs) if ours else 0.0
    measured = f"{format_measurement(ratio, abs(ratio) * relative)} times the baseline's"
    if abs(ours - theirs) < 2 * math.hypot(*errors):
        return f"{title}: {measured}; the two cannot be told apart at two standard errors."
    return f"{title}: {measured}; {'lower' if ours < theirs else 'higher' if ours > theirs else 'the same'}."


def _comparison_section(runs: Sequence[Run], baseline: Run | None) -> str:
    if len(runs) == 1:
        return "One run: nothing to compare it with."
    if baseline is None:
        return "No comparison: none of the runs is a U run, and no --baseline was given."
    paragraphs = [
        f"Baseline: {baseline.label}. The standard errors are those of the test set. They do not cover the variation "
        "from one training seed to another; for that, train with several seeds. Errors of ratios treat the two runs "
        "as independent."
    ]
    for run in runs:
        if run is baseline:
            continue
        lines = [
            _compare_nll(run, baseline),
            _compare_ratio(run, baseline, "nasym", "NAsym"),
            _compare_ratio(run, baseline, "asym", "Asym"),
        ]
        steps = run.number("checkpoint_step"), baseline.number("checkpoint_step")
        if steps[0] != steps[1]:
            lines.append(
                f"Trained for different lengths: step {_format_count(steps[0])}, the baseline's "
                f"{_format_count(steps[1])}; part of a difference may come from that."
            )
        paragraphs.append("\n".join([f"{run.label} against the baseline:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(paragraphs)


def tables_and_comparisons(runs: Sequence[Run], baseline: str | None = None) -> str:
    """The report without its figures, in Markdown.

    Raises:
        ValueError: ``baseline`` is not the name of one of the runs.
    """
    base = _find_baseline(runs, baseline)
    parts = [
        f"# Results on {runs[0].dataset}",
        _our_table(runs),
        _table_notes(runs),
        _features_note(runs),
        _paper_section(runs),
        "## Comparison with the baseline",
        _comparison_section(runs, base),
    ]
    return "\n\n".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------------------- figures

_WIDTH = 6.9  # inches: both columns of the page
_DPI = 200
# Okabe and Ito's palette without its yellow, which is too light for lines on white; told apart by colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_STYLE = {
    "font.size": 8,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
}


_CIRCLES = {
    "linestyle": "",
    "marker": "o",
    "markersize": 3,
    "markerfacecolor": "white",
    "markeredgewidth": 0.9,
    "zorder": 4,
}


def _line_style(index: int) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "linestyle": _DASHES[index % len(_DASHES)]}


def _figure(width: float, height: float, **options: Any) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def _legend_below(figure: Figure, entries: dict[str, Any]) -> None:
    columns = 1 if max(map(len, entries)) > 48 else 2 if max(map(len, entries)) > 24 or len(entries) % 2 == 0 else 3
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.5
    )


def _value_axis(axes: Any, values: np.ndarray) -> None:
    """Fits the y axis to ``values``: logarithmic if they are positive and span more than a factor of ten (below that
    a linear one has the better ticks), with few labels over many decades and plain numbers within two."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low <= 0 or high < 10 * low:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        return
    axes.set_yscale("log")
    axes.set_ylim(low * (low / high) ** 0.06, high * (high / low) ** 0.06)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    if decades > 6:
        axes.yaxis.set_minor_locator(NullLocator())
    elif decades > 2 or low < 1e-3 or high > 1e4:
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=80))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=20))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)


def _asymmetry_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3a: Asym and NAsym against t, one curve for each run with a band of ±1 standard error."""
    notes = [f"{run.label} has no eval/asymmetry.npz." for run in runs if run.asymmetry is None]
    drawn = [(i, run) for i, run in enumerate(runs) if run.asymmetry is not None]
    if not drawn:
        return None, notes
    figure = _figure(_WIDTH, 2.75, layout="constrained")
    panels = figure.subplots(1, 2)
    entries: dict[str, Any] = {}
    spanned: dict[str, list[np.ndarray]] = {"asym": [], "nasym": []}
    for i, run in drawn:
        arrays = run.asymmetry
        largest = arrays["nasym"].max()
        if largest < NASYM_ROUND_OFF:
            # No logarithmic axis has room for a zero beside numbers of ordinary size.
            shown = f"NAsym ≤ {_plain_exponent(f'{largest:.0e}')}" if largest > 0 else "exactly"
            entries[f"{run.label}: 0 ({shown}), not drawn"] = panels[0].plot([], [], **_line_style(i))[0]
            continue
        order = np.argsort(arrays["t"])
        t = arrays["t"][order]
        for axes, key in zip(panels, ("asym", "nasym"), strict=True):
            value, error = arrays[key][order].astype(np.float64), arrays[f"{key}_se"][order].astype(np.float64)
            value = np.where(value > 0, value, np.nan)
            marker = {"marker": "o", "markersize": 3} if t.size <= 20 else {}
            (line,) = axes.plot(t, value, **_line_style(i), **marker)
            # A band reaching zero would run off a logarithmic axis: it is cut at a tenth of its curve.
            lower = np.maximum(value - error, 0.1 * value)
            axes.fill_between(t, lower, value + error, color=line.get_color(), alpha=0.22, linewidth=0)
            spanned[key] += [lower, value + error]
            entries.setdefault(run.label, line)
    titles = {"asym": "Asym (units of $x^{-4}$)", "nasym": "NAsym (dimensionless)"}
    for axes, key in zip(panels, titles, strict=True):
        axes.set_xlabel("diffusion time $t$")
        axes.set_ylabel(titles[key])
        if np.isfinite(np.concatenate(spanned[key] or [[np.nan]])).any():
            _value_axis(axes, np.concatenate(spanned[key]))
    _legend_below(figure, entries)
    return figure, notes


def _samples_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """Figure 3b: rows are runs, columns seeds. Images are enlarged by a whole number, so that pixels stay sharp."""
    notes = [f"{run.label} has no eval/samples.npz." for run in runs if run.samples is None]
    drawn = [run for run in runs if run.samples is not None]
    if not drawn:
        return None, notes
    shapes = {run.samples.shape[1:] for run in drawn}
    if len(shapes) > 1:
        return None, [*notes, f"The samples differ in size: {', '.join(map(str, sorted(shapes)))} (H, W, C)."]
    for what, found in (
        ("sampler", {run.metrics["sampler"] for run in drawn}),
        ("config.seed", {run.config.get("seed") for run in drawn}),
    ):
        if len(found) > 1:
            notes.append(f"Equal columns are not comparable: the runs differ in {what} ({_join(found)}).")
    height, width, _ = drawn[0].samples.shape[1:]
    labels = []
    for run in drawn:
        wrapped = textwrap.fill(run.name, 22, break_on_hyphens=False)
        labels.append(f"{run.model}{f', λ = {_short(run.qc_weight)}' if run.kind == 'QC' else ''}\n{wrapped}")
    # In pixels of the figure; 13 is more than a character of 8 pt needs on average.
    margin, gap, header, footer = 24 + 13 * max(len(line) for text in labels for line in text.split("\n")), 4, 12, 78
    room = round(_WIDTH * _DPI) - margin
    columns = max(1, min(10, room // (width + gap), *(len(run.samples) for run in drawn)))
    zoom = max(1, min(room // columns - gap, 220) // max(width, height))
    cell_h, cell_w = zoom * height + gap, zoom * width + gap
    canvas = np.ones((cell_h * len(drawn) - gap, cell_w * columns - gap, 3))
    for row, run in enumerate(drawn):
        for column in range(columns):
            image = np.kron(run.samples[column], np.ones((zoom, zoom, 1)))
            top, left = row * cell_h, column * cell_w
            canvas[top : top + zoom * height, left : left + zoom * width] = image
    total_w, total_h = margin + canvas.shape[1] + gap, header + canvas.shape[0] + footer
    figure = _figure(total_w / _DPI, total_h / _DPI)
    axes = figure.add_axes(
        (margin / total_w, footer / total_h, canvas.shape[1] / total_w, canvas.shape[0] / total_h), frameon=False
    )
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.grid(False)
    axes.set_yticks([row * cell_h + (cell_h - gap) / 2 for row in range(len(drawn))], labels)
    axes.set_xticks([column * cell_w + (cell_w - gap) / 2 for column in range(columns)], map(str, range(columns)))
    axes.tick_params(length=0)
    axes.set_xlabel("sample index (one column: the same seed in every run)", labelpad=2)
    return figure, notes


def _join(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours (odd), over those that exist at the ends; shape (N,) to (N,)."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def _training_figure(runs: Sequence[Run]) -> tuple[Figure | None, list[str]]:
    """DSM loss, and the QC term where there is one, against the training step: raw values faint, a running mean over
    1/10 of the rows on top, the test loss as circles."""
    from matplotlib.lines import Line2D

    notes = [f"{run.label} has no metrics.jsonl." for run in runs if run.log is None]
    panels_of = {
        key: [(i, run, *_series(run.log, key)) for i, run in enumerate(runs) if run.log is not None]
        for key in ("dsm", "qc", "eval_loss")
    }
    panels_of = {key: [entry for entry in entries if entry[2].size] for key, entries in panels_of.items()}
    logged = {entry[0] for entry in panels_of["dsm"]}
    notes += [
        f"metrics.jsonl of {run.label} has no training rows."
        for i, run in enumerate(runs)
        if run.log is not None and i not in logged
    ]
    if not panels_of["dsm"]:
        return None, notes
    shown = [key for key in ("dsm", "qc") if panels_of[key]]
    figure = _figure(_WIDTH if len(shown) == 2 else 0.62 * _WIDTH, 2.75, layout="constrained")
    entries: dict[str, Any] = {}
    last_step = max(entry[2].max() for entry in panels_of["dsm"])
    unit, unit_name = (1000.0, "training step (thousands)") if last_step >= 10_000 else (1.0, "training step")
    reduced = {run.config["training"].get("reduce_mean") for run in runs}
    if len(reduced) > 1:
        notes.append("The losses are not on one scale: the runs differ in config.training.reduce_mean.")
    scale = {(True,): " per dim.", (False,): " (½ sum)"}.get(tuple(reduced), "")
    faint = {"alpha": min(0.3, 0.6 / len(runs)), "linewidth": 0.5, "zorder": 1}
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        spanned: list[np.ndarray] = []
        for i, run, steps, values in panels_of[key]:
            smooth = _running_mean(values, min(max(3, 2 * (values.size // 20) + 1), values.size))
            axes.plot(steps / unit, values, color=_line_style(i)["color"], **faint)
            (line,) = axes.plot(steps / unit, smooth, **_line_style(i), zorder=3)
            entries.setdefault(run.label, line)
            spanned += [smooth, np.quantile(values, (0.25, 0.75))]
        for i, _, steps, values in panels_of["eval_loss"] if key == "dsm" else ():
            axes.plot(steps / unit, values, color=_line_style(i)["color"], **_CIRCLES)
            spanned.append(values)
        axes.set_xlabel(unit_name)
        axes.set_ylabel({"dsm": "DSM loss", "qc": "QC term $L_\\mathrm{QC}$"}[key] + scale)
        # Single batches scatter far more than the curves differ: the axis spans the means, the test losses and the
        # middle half of the rows.
        _value_axis(axes, np.concatenate(spanned))
    if panels_of["eval_loss"]:
        entries["test loss"] = Line2D([], [], color="#444444", **_CIRCLES)
    _legend_below(figure, entries)
    return figure, notes


# File, heading, how it is drawn, caption.
_FIGURES: tuple[tuple[str, str, Callable[..., tuple[Figure | None, list[str]]], str], ...] = (
    (
        "asymmetry_vs_t.png",
        "Asym and NAsym against t",
        _asymmetry_figure,
        "As Figure 3a of the paper: mean over the test images at each noise level, band ±1 standard error. Asym has "
        "the units of the squared Jacobian of the score, (pixel scale)⁻⁴.",
    ),
    (
        "samples_same_seed.png",
        "Samples from the same seeds",
        _samples_figure,
        "As Figure 3b of the paper: each column starts from the same random numbers in every run.",
    ),
    (
        "training_curves.png",
        "Training curves",
        _training_figure,
        "Running mean over a tenth of the logged rows; faint: the rows themselves; circles: test loss. The axis "
        "may cut the largest rows. The QC term is shown before it is weighted with λ.",
    ),
)

# ------------------------------------------------------------------------------------------------------------- writing


def _write_figures(runs: Sequence[Run], output: Path) -> list[str]:
    """Draws every figure and returns its section of the report; of one that cannot be drawn, no older file stays."""
    import matplotlib

    sections = []
    with matplotlib.rc_context(_STYLE):
        for file_name, heading, draw, caption in _FIGURES:
            figure, notes = draw(runs)
            if figure is None:
                (output / file_name).unlink(missing_ok=True)
                lines = [f"`{file_name}` was not drawn.", *notes]
            else:
                write_atomically(output / file_name, partial(figure.savefig, format="png"))
                lines = [f"![{heading}]({file_name})", "", caption, *notes]
            sections.append("\n".join([f"## {heading}", "", *lines]))
    return sections


def write_report(paths: Sequence[Path], output: Path | None = None, baseline: str | None = None) -> str:
    """Writes table, comparisons and figures of the runs and returns the text of ``report.md``.

    Args:
        paths: the working directories, in the order of the table's rows.
        output: the folder written to; without it the folder that all runs lie in.
        baseline: the name of the run the others are compared with; without it the first U run.

    Raises:
        FileNotFoundError, ValueError: see ``load_runs``; also an unknown baseline, and ``output`` being a file.
    """
    runs = load_runs(paths)
    text = tables_and_comparisons(runs, baseline)
    output = output or Path(os.path.commonpath([path.resolve().parent for path in paths]))
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; a folder is needed")
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([text, *_write_figures(runs, output)]) + "\n"
    for name, content in (("report.csv", _csv_text(runs)), ("report.md", text)):
        write_atomically(output / name, lambda file, content=content: file.write(content.encode()))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Tables and figures of the paper from evaluated runs of one data set."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a --workdir of main.py, evaluated")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to write to (default: the runs' own)")
    parser.add_argument("--baseline", metavar="NAME", help="run to compare with (default: the first U run)")
    flags = parser.parse_args(arguments)
    try:
        text = write_report(flags.runs, flags.output, flags.baseline)
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
