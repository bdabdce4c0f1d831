"""What the paper reports, and of what: Tables 2 and 3 of Chao, Sun, Cheng and Lee (ICML 2023, arXiv 2209.12753).

A number of ours stands next to the paper's if the run has the paper's setting: ``differing_settings`` compares the
run's ``config.json`` with ``configs/qcsbm``, its log and ``eval/metrics.json`` with the paper's length of training and
protocol of evaluation. What it does not compare, because the paper's tables do not say it: the number of images and of
probes that Asym and NAsym are means of.
"""

from __future__ import annotations

import json
from typing import Any

from configs.qcsbm.cifar10 import get_config
from experiment.files import flatten
from report.runs import Run

PAPER_SOURCE = (
    "The paper: Chao, Sun, Cheng and Lee, ICML 2023, arXiv 2209.12753. Table 2: NLL, Asym and NAsym (QC: λ = 1e-4, "
    "K = 16 probes, batch 8). Table 3: FID, IS, precision and recall of 50 000 samples of the PC sampler, Inception "
    "features (QC: λ = 1e-4, K = 1, batch 128). QC continues U from iteration 600 000; all are evaluated at 700 000. "
    "The paper counts predictor steps as NFE."
)

TABLE_2 = ("nll_bits_per_dim", "asym", "nasym")
TABLE_3 = ("fid", "inception_score", "precision", "recall")
INCEPTION = ("inception", "inception-tfhub")
"""Features of the Inception network of 2015, from torch-fidelity or TF-Hub, as in the literature."""
PREDICTOR_STEPS = 1000
"""What the paper calls the NFE of its PC sampler."""


# data set → model (C, U, QC) → metrics of Tables 2 and 3 as printed there.
PAPER: dict[str, dict[str, dict[str, str]]] = {
    dataset: {model: dict(zip((*TABLE_2, *TABLE_3), text.split(), strict=False)) for model, text in models.items()}
    for dataset, models in {
        "cifar10": {
            "C": "5.91 0 0 10.97 8.58 0.61 0.58",
            "U": "3.46 1.88e8 1.90e-3 2.50 9.58 0.67 0.60",
            "QC": "3.38 3.49e7 8.41e-4 2.48 9.70 0.67 0.60",
        },
        "imagenet32": {
            "C": "5.10 0 0 28.97 8.58 0.61 0.45",
            "U": "3.96 2.05e7 7.17e-4 19.82 9.89 0.60 0.52",
            "QC": "3.83 1.13e7 5.47e-4 19.62 9.94 0.61 0.52",
        },
        "cifar100": {"C": "5.34 0 0", "U": "3.50 2.98e8 2.25e-3", "QC": "3.44 9.31e7 1.44e-3"},
        "svhn": {"C": "5.00 0 0", "U": "2.15 3.06e7 6.54e-4", "QC": "2.01 1.69e7 4.80e-4"},
    }.items()
}

# What decides the trained weights, but for fields that say where data are and what is kept, and for those that other
# lines show: the schedule, the step evaluated, the first step of QC. Its estimator is a deviation (docs/deviations.md).
_COMPARED = ("data.", "training.", "optim.", "model.")
_NOT_COMPARED = ("data.dataset", "data.path", "data.root", "data.download", "data.resize", "model.schedule")
_NOT_COMPARED += ("training.n_iters", "training.init_from", "training.qc_estimator", "training.qc_probe_chunk")
_NOT_COMPARED += ("training.activation_checkpointing", "training.log_freq", "training.eval_freq", "training.snapshot")
_NOT_COMPARED += ("training.keep_checkpoints",)
_QC_STARTS_AT = 600_000
_LIKELIHOOD = "rk45, rtol 0.001, atol 1e-05"


def differing_settings(run: Run, table: int) -> list[str]:
    """In words, the settings in which a run differs from those of the paper's ``table``, 2 or 3; [] if in none.

    Protocols of numbers that were not computed do not count.
    """
    model = {"C": "c", "U": "u", "QC": "qc" if table == 2 else "qc_sampling"}[run.kind]
    paper, ours = flatten(json.loads(get_config(model).to_json())), flatten(run.config)
    ignored = _NOT_COMPARED if run.kind == "QC" else (*_NOT_COMPARED, "training.qc_")
    names = [name for name in paper if name.startswith(_COMPARED) and not name.startswith(ignored)]
    pairs = {name: (ours.get(name), paper[name]) for name in names}
    # Empty is the first of the SDE's schedules, geometric.
    pairs["model.schedule"] = (ours.get("model.schedule") or "geometric", "geometric")
    if run.kind == "QC":
        pairs["first step of QC"] = (_first_qc_step(run), _QC_STARTS_AT)
    pairs["step evaluated"] = (run.number("checkpoint_step"), paper["training.n_iters"])
    pairs |= _likelihood_and_asymmetry(run) if table == 2 else _sampling(run)
    return [f"{what} {_shown(ours)} (paper: {_shown(paper)})" for what, (ours, paper) in pairs.items() if ours != paper]


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _first_qc_step(run: Run) -> int | None:
    """Where U ended and QC began: within one logging interval before the first row of the log; the paper's step if it
    lies there."""
    first = next((row["step"] for row in run.log if "dsm" in row), None)
    if first is None:
        return None
    before = max(first - run.config["training"]["log_freq"], 0)
    return _QC_STARTS_AT if before <= _QC_STARTS_AT < first else before


def _likelihood_and_asymmetry(run: Run) -> dict[str, tuple[Any, Any]]:
    pairs = {}
    if run.number("nll_bits_per_dim") is not None:
        solver, every = run.metrics["likelihood"], run.number("nll_images") == run.number("test_images")
        pairs["likelihood"] = (_LIKELIHOOD if solver.endswith(_LIKELIHOOD) else solver, _LIKELIHOOD)
        pairs["test images for NLL"] = ("all" if every else run.number("nll_images"), "all")
    if run.number("asym") is not None:
        pairs["noise levels of Asym"] = (run.number("asym_levels"), 100)
        pairs["first noise level of Asym"] = (run.number("asym_first_level"), 0)
    return pairs


def _sampling(run: Run) -> dict[str, tuple[Any, Any]]:
    features = run.metrics["features"]
    return {
        "sampler": (run.metrics["sampler"], f"PC, reverse_diffusion + langevin (snr 0.16), {PREDICTOR_STEPS} steps"),
        "samples": (run.number("num_samples"), 50_000),
        "images compared with": (run.number("num_reference"), 50_000),
        "features": (INCEPTION[0] if features in INCEPTION else features, INCEPTION[0]),
    }
