"""An evaluated run, as the report reads it from its working directory.

Files of a run W: ``config.json``, ``eval/metrics.json`` (both required), ``metrics.jsonl``, ``eval/asymmetry.npz``,
``eval/samples.npz``, ``eval/nll.npz``, and ``samples/*/metrics.json`` of every further sampler.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiment.files import parse_json, read_arrays


class Column(NamedTuple):
    """One column of the table."""

    key: str  # in eval/metrics.json; the standard error, where there is one, is key + "_se"
    title: str  # with the unit
    best: Callable[..., Any] | None = None  # min or max; None where no value is better than another
    from_features: bool = False  # whether it depends on the feature extractor and the number of samples


# NFE is not ranked: an evaluation of a conservative score costs a forward and a backward pass, one of the others only
# a forward pass, so that the smaller count need not be the cheaper one.
COLUMNS = (
    Column("nll_bits_per_dim", "NLL ↓ (bits/dim)", min),
    Column("nll_nats_per_dim", "NLL ↓ (nats/dim)", min),
    Column("asym", "Asym ↓", min),
    Column("nasym", "NAsym ↓", min),
    Column("fid", "FID ↓", min, from_features=True),
    Column("kid", "KID ↓", min, from_features=True),
    Column("inception_score", "IS ↑", max, from_features=True),
    Column("precision", "Precision ↑", max, from_features=True),
    Column("recall", "Recall ↑", max, from_features=True),
    Column("sliced_w2", "Sliced W₂ ↓", min),
    Column("marginal_w1", "W₁ of marginals ↓", min),
    Column("spectrum_error", "Error of spectrum ↓", min),
    Column("nfe_sampling", "NFE sampling"),
    Column("nfe_likelihood", "NFE likelihood"),
    Column("num_samples", "Samples"),
    Column("checkpoint_step", "Step"),
)

NUMBERS = {"nll_nats_per_dim", "sliced_w2", "marginal_w1", "spectrum_error"}
"""Keys of the columns of data that are no pictures."""

# In single precision J − Jᵀ of an exactly conservative score is round-off: about 1e-7 of J, times what the depth of
# the network adds. NAsym is the square of such a ratio; 1e-8 is a relative asymmetry of 1e-4.
NASYM_ROUND_OFF = 1e-8


@dataclass(frozen=True)
class Run:
    """An evaluated working directory; what an optional file would have held is ``None`` without it."""

    path: Path
    name: str  # what the report calls it, unique within one report
    config: dict[str, Any]
    metrics: dict[str, Any]  # None is not computed
    log: list[dict[str, Any]]
    asymmetry: dict[str, np.ndarray] | None  # t, sigma, asym, asym_se, nasym, nasym_se, (T,) each
    samples: np.ndarray | None  # the first ten, float64 (N, H, W, C) in [0, 1]
    nll: np.ndarray | None  # bits/dim of each test image, or nats/dim of numbers (N,)
    samplers: list[dict[str, Any]]  # metrics of samples: those of the evaluation, and others of the same weights
    evaluated: str  # the day

    @property
    def kind(self) -> str:
        """C (conservative), QC (unconstrained with λ > 0) or U (unconstrained)."""
        if self.config["model"]["parameterization"] == "conservative":
            return "C"
        return "QC" if self.config["training"]["qc_weight"] > 0 else "U"

    @property
    def model(self) -> str:
        """The model as the paper names it, e.g. "QC-NCSN++"."""
        model = self.config["model"]
        if model["name"] != "ncsnpp":
            return f"{self.kind}-{model['name']}"
        # One network under one name; the time embedding is what the published configs of the two differ in.
        return f"{self.kind}-{'DDPM++' if model['embedding_type'] == 'positional' else 'NCSN++'}"

    @property
    def label(self) -> str:
        """Model and run, e.g. "QC-NCSN++ (qc, λ = 0.02)"."""
        weight = f", λ = {self.config['training']['qc_weight']:g}" if self.kind == "QC" else ""
        return f"{self.model} ({self.name}{weight})"

    @property
    def dataset(self) -> str:
        """``config.data.dataset``; for a user's own images with the name of their file or folder."""
        data = self.config["data"]
        return data["dataset"] + (f" ({Path(data['path']).name})" if data["path"] else "")

    @property
    def training_seconds(self) -> float:
        """What the log says; each time the run was stopped, at most ``log_freq`` steps are missing."""
        seconds = [row["seconds"] for row in self.log if "seconds" in row]
        following = [*seconds[1:], 0.0]
        return sum(s for s, after in zip(seconds, following, strict=False) if after < s)

    def number(self, key: str) -> float | None:
        """A number of ``eval/metrics.json``; ``None`` where it was not computed or is not finite."""
        value = self.metrics.get(key)
        return value if value is not None and math.isfinite(value) else None

    def error(self, key: str) -> float | None:
        """The standard error of the metric ``key``; ``None`` where it has none."""
        return self.number(f"{key}_se")

    @property
    def asym_is_round_off(self) -> bool:
        """Whether Asym and NAsym are zero as far as single precision can tell (NAsym below ``NASYM_ROUND_OFF``)."""
        nasym = self.number("nasym")
        return nasym is not None and abs(nasym) < NASYM_ROUND_OFF


def nll_key(metrics: dict[str, Any]) -> str:
    """Of levels bits/dim, of floating-point numbers nats/dim."""
    numbers = metrics.get("nll_bits_per_dim") is None and metrics.get("nll_nats_per_dim") is not None
    return "nll_nats_per_dim" if numbers else "nll_bits_per_dim"


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """Those of a table: of pictures all but ``NUMBERS``, of other data what has been measured."""
    measured = {column.key for column in COLUMNS if any(run.number(column.key) is not None for run in runs)}
    if "nll_bits_per_dim" in measured:
        measured.discard("nll_nats_per_dim")
    pictures = not measured & NUMBERS
    return [column for column in COLUMNS if column.key in measured or (pictures and column.key not in NUMBERS)]


def load_run(path: Path) -> Run:
    """Read the working directory ``path``; the run is called ``config.label``, or else as the folder.

    Raises:
        FileNotFoundError: no ``config.json``, or not evaluated yet.
        ValueError: a damaged file; the message names it.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; a RUN is a --workdir of main.py")
    if not (path / "eval" / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{path}: no eval/metrics.json; run --mode eval first: "
            f"python main.py --config=... --workdir={path} --mode eval"
        )
    [config], [metrics] = _json_rows(path / "config.json"), _json_rows(path / "eval" / "metrics.json")
    pictures = metrics.get("sliced_w2") is None
    samples = _arrays(path / "eval" / "samples.npz", "images", "num_levels") if pictures else None
    nll = _arrays(path / "eval" / "nll.npz", nll_key(metrics))
    step = metrics.get("checkpoint_step") or 0
    others = sorted((path / "samples").glob(f"step_{step:08d}-*/metrics.json"))
    samplers = [metrics, *(row for file in others for row in _json_rows(file))]
    run = Run(
        path=path,
        name=config.get("label") or path.resolve().name,
        config=config,
        metrics=metrics,
        log=_json_rows(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else [],
        asymmetry=_arrays(path / "eval" / "asymmetry.npz", "t", "asym", "asym_se", "nasym", "nasym_se"),
        samples=samples and samples["images"][:10] / max(int(samples["num_levels"]) - 1, 1),
        nll=nll and nll[nll_key(metrics)].astype(np.float64),
        samplers=[row for row in samplers if row.get("outside_range") is not None],
        evaluated=f"{date.fromtimestamp((path / 'eval' / 'metrics.json').stat().st_mtime)}",
    )
    try:
        _ = run.label, run.dataset
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: not the config of a run, {error!r}") from None
    return run


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON object of a .json file, or those of the lines of a .jsonl file."""
    text = file.read_bytes()
    rows = [parse_json(part, file) for part in (text.splitlines() if file.suffix == ".jsonl" else [text])]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is damaged: JSON objects are needed")
    return rows


def _arrays(file: Path, *names: str) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    arrays = read_arrays(file)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{file}: no array {missing[0]}")
    return arrays


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs under names that tell them apart.

    Raises:
        FileNotFoundError, ValueError: see ``load_run``; also no run, or one given twice.
    """
    if not paths:
        raise ValueError("no RUN is given; a RUN is a --workdir of main.py, evaluated")
    resolved = [Path(path).resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]}: the run is given twice")
    runs = [load_run(Path(path)) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        # Equal labels or folder names: the paths below the common folder are what tells the runs apart.
        common = os.path.commonpath(resolved)
        runs = [replace(run, name=os.path.relpath(run.path.resolve(), common)) for run in runs]
    return runs


def by_dataset(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each data set, in the order given: of one name, file or folder, and shape."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        data = run.config["data"]
        shape = tuple(data.get("shape") or [data["image_size"]])
        groups.setdefault((dataset_key(data["dataset"]), data["path"], shape), []).append(run)
    return list(groups.values())


def dataset_key(dataset: str) -> str:
    """The name without case and punctuation; the paper's ImageNet-32x32 under one of its two spellings."""
    key = "".join(c for c in dataset.lower() if c.isalnum())
    return "imagenet32" if key == "imagenet32x32" else key
