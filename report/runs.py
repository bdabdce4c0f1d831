"""An evaluated run, as the report reads it from its working directory.

Files of a run W: ``config.json``, ``eval/metrics.json`` (both required), ``metrics.jsonl``, ``eval/asymmetry.npz``,
``eval/samples.npz``, ``eval/nll.npz``.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "COLUMNS",
    "INCEPTION",
    "NASYM_ROUND_OFF",
    "PROTOCOL",
    "WITH_ERROR",
    "Column",
    "Run",
    "by_dataset",
    "dataset_key",
    "load_run",
    "load_runs",
    "plain_exponent",
    "short",
]


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        key: the metric's name in ``eval/metrics.json``; its standard error, where there is one, is ``key + "_se"``.
        title: the heading, with the unit.
        best: ``min`` or ``max``, or ``None`` where no value is better than another.
        from_features: whether the number depends on the feature extractor and on the number of samples.
    """

    key: str
    title: str
    best: Callable[..., Any] | None = None
    from_features: bool = False


# NFE is not ranked: an evaluation of a conservative score costs a forward and a backward pass, one of the others only
# a forward pass, so that the smaller count need not be the cheaper one.
COLUMNS = (
    Column("nll_bits_per_dim", "NLL ↓ (bits/dim)", min),
    Column("asym", "Asym ↓", min),
    Column("nasym", "NAsym ↓", min),
    Column("fid", "FID ↓", min, from_features=True),
    Column("kid", "KID ↓", min, from_features=True),
    Column("inception_score", "IS ↑", max, from_features=True),
    Column("precision", "Precision ↑", max, from_features=True),
    Column("recall", "Recall ↑", max, from_features=True),
    Column("nfe_sampling", "NFE sampling"),
    Column("nfe_likelihood", "NFE likelihood"),
    Column("num_samples", "Samples"),
    Column("checkpoint_step", "Step"),
)
WITH_ERROR = ("nll_bits_per_dim", "asym", "nasym", "kid")
# How the numbers were measured: which part of the test set, how many noise levels, probes, predictor steps, and images
# that samples were compared with.
PROTOCOL = ("nll_images", "asym_images", "test_images", "asym_levels", "asym_probes", "sampling_steps", "num_reference")
_NUMBERS = (*(c.key for c in COLUMNS), *(f"{key}_se" for key in WITH_ERROR), "feature_test_accuracy", *PROTOCOL)

# Features of the Inception network of 2015, from torch-fidelity or TF-Hub, as in the literature.
INCEPTION = ("inception", "inception-tfhub")

# In single precision J − Jᵀ of an exactly conservative score is round-off: about 1e-7 of J, times what the depth of
# the network adds. NAsym is the square of such a ratio; 1e-8 is a relative asymmetry of 1e-4.
NASYM_ROUND_OFF = 1e-8


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
        samples: the first (at most 16) images, float64 (N, H, W, C) in [0, 1], or ``None``.
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
        weight = f", λ = {short(self.qc_weight)}" if self.kind == "QC" else ""
        return f"{self.model} ({self.name}{weight})"

    def number(self, key: str) -> float | None:
        """A number of ``eval/metrics.json``; ``None`` where it was not computed."""
        return self.metrics[key]

    def error(self, key: str) -> float | None:
        """The standard error of the metric ``key``; ``None`` where it has none or it is not finite."""
        value = self.metrics[f"{key}_se"] if key in WITH_ERROR else None
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
    for key in ("features", "reference", "backend", "sampler", "likelihood"):
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


_SAMPLES_KEPT = 16  # more than fit into the figure; all 50 000 would be more than a gigabyte


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
    return images[:_SAMPLES_KEPT] / max(top, 1)


def _read_nll(file: Path) -> np.ndarray | None:
    arrays = _read_arrays(file, "nll_bits_per_dim")
    if arrays is None:
        return None
    nll = arrays["nll_bits_per_dim"].astype(np.float64)
    if nll.ndim != 1 or nll.size == 0:
        raise ValueError(f"{file}: nll_bits_per_dim must have the shape (N,); found {nll.shape}")
    return nll


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs under names that tell them apart.

    Raises:
        FileNotFoundError, ValueError: see ``load_run``; also a run given twice.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]}: the run is given twice")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        # Equal labels or folder names: the paths below the common folder are what tells the runs apart.
        common = os.path.commonpath(resolved)
        runs = [load_run(path, os.path.relpath(full, common)) for path, full in zip(paths, resolved, strict=True)]
    return runs


def by_dataset(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each data set, in the order given: of one name, file or folder, and image size."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        data = run.config["data"]
        key = dataset_key(data["dataset"]), data.get("path") or "", data.get("image_size")
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def dataset_key(dataset: str) -> str:
    """The name without case and punctuation; the paper's ImageNet-32x32 under one of its two spellings."""
    key = "".join(c for c in dataset.lower() if c.isalnum())
    return "imagenet32" if key == "imagenet32x32" else key


def plain_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def short(value: float) -> str:
    """The shortest of the usual notations: "0.05", "1e-4"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:g}" if -3 < int(exponent) < 4 or value == 0 else f"{float(mantissa):g}e{int(exponent)}"
