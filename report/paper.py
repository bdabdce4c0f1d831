"""What the paper reports, and of what: Tables 2 and 3 of Chao, Sun, Cheng and Lee (ICML 2023, arXiv 2209.12753).

A number of ours stands next to the paper's if the run has the paper's setting: ``differing_settings`` compares the
run's ``config.json``, log and ``eval/metrics.json`` with the paper's network, SDE, optimiser, data, length of training
and protocol of evaluation. What it does not compare, because the paper's tables do not say it: the number of images
and of probes that Asym and NAsym are means of. Deviations of the code itself (docs/deviations.md) are no settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report.runs import Run

__all__ = ["INCEPTION", "PAPER", "PAPER_SOURCE", "PREDICTOR_STEPS", "TABLE_2", "TABLE_3", "differing_settings"]

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

# ----------------------------------------------------------------------------------------------------------- settings

# Fields of config.json with the values that are the paper's; the first is how the paper would put it.
_TRAINING: dict[str, tuple[Any, ...]] = {
    "model.name": ("ncsnpp",),
    "model.nf": (128,),
    "model.ch_mult": ([1, 2, 2, 2],),
    "model.num_res_blocks": (8,),
    "model.attn_resolutions": ([16],),
    "model.dropout": (0.1,),
    "model.nonlinearity": ("swish",),
    "model.conditional": (True,),
    "model.scale_by_sigma": (True,),
    "model.embedding_type": ("fourier",),
    "model.fourier_scale": (16,),
    "model.resblock_type": ("biggan",),
    "model.resamp_with_conv": (True,),
    "model.fir": (True,),
    "model.fir_kernel": ([1, 3, 3, 1],),
    "model.skip_rescale": (True,),
    "model.progressive": ("none",),
    "model.progressive_input": ("residual",),
    "model.progressive_combine": ("sum",),
    "model.ema_rate": (0.999,),
    "model.schedule": ("geometric", ""),  # empty: the first of the SDE's schedules, geometric
    "model.sigma_min": (0.01,),
    "model.sigma_max": (50,),
    "training.sde": ("vesde",),
    "training.continuous": (True,),
    "training.likelihood_weighting": (False,),
    "training.reduce_mean": (False,),
    "optim.optimizer": ("Adam",),
    "optim.lr": (2e-4,),
    "optim.beta1": (0.9,),
    "optim.weight_decay": (0,),
    "optim.warmup": (5000,),
    "optim.grad_clip": (1,),
    "data.image_size": (32,),
    "data.num_channels": (3,),
    "data.centered": (False,),
    "data.random_flip": (True,),
    "data.uniform_dequantization": (False,),
}
_STEPS = 700_000
_QC_STARTS_AT = 600_000
_QC = {"training.qc_weight": (1e-4,), "training.qc_interval": (1,), "training.qc_stride": (1,)}
_QC_PROBES = {2: 16, 3: 1}
_QC_BATCH = {2: 8, 3: 128}
_LIKELIHOOD = "rk45, rtol 0.001, atol 1e-05"
_ASYM_LEVELS = 100
_SAMPLER = f"PC, reverse_diffusion + langevin (snr 0.16), {PREDICTOR_STEPS} steps"
_NUM_SAMPLES = 50_000


def differing_settings(run: Run, table: int) -> list[str]:
    """In words, the settings in which a run differs from those of the paper's ``table``, 2 or 3; [] if in none.

    Protocols of numbers that were not computed do not count.
    """
    wanted = dict(_TRAINING)
    if run.kind == "QC":
        wanted |= _QC
        wanted |= {"training.qc_probes": (_QC_PROBES[table],), "training.batch_size": (_QC_BATCH[table],)}
    else:
        wanted |= {"training.qc_weight": (0,), "training.batch_size": (128,)}
    found = {name: _field(run.config, name) for name in wanted}
    different = [
        _difference(name, found[name], allowed[0]) for name, allowed in wanted.items() if found[name] not in allowed
    ]
    if run.kind == "QC":
        different += _qc_start(run)
    if run.number("checkpoint_step") != _STEPS:
        different.append(_difference("step evaluated", run.number("checkpoint_step"), _STEPS))
    return different + (_likelihood_and_asymmetry(run) if table == 2 else _sampling(run))


def _field(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _difference(what: str, ours: Any, paper: Any) -> str:
    return f"{what} {_shown(ours)} (paper: {_shown(paper)})"


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _qc_start(run: Run) -> list[str]:
    """Where U ended and QC began: within one logging interval before the first row of the log."""
    steps = [row["step"] for row in run.log if "dsm" in row]
    if not steps:
        return [_difference("first step of QC", None, _QC_STARTS_AT)]
    before = max(steps[0] - run.config["training"]["log_freq"], 0)
    return [] if before <= _QC_STARTS_AT < steps[0] else [_difference("first step of QC", before, _QC_STARTS_AT)]


def _likelihood_and_asymmetry(run: Run) -> list[str]:
    different = []
    if run.number("nll_bits_per_dim") is not None:
        if not run.metrics["likelihood"].endswith(_LIKELIHOOD):
            different.append(_difference("likelihood", run.metrics["likelihood"], _LIKELIHOOD))
        if run.number("nll_images") != run.number("test_images"):
            different.append(_difference("test images for NLL", run.number("nll_images"), "all"))
    if run.number("asym") is not None and run.number("asym_levels") != _ASYM_LEVELS:
        different.append(_difference("noise levels of Asym", run.number("asym_levels"), _ASYM_LEVELS))
    return different


def _sampling(run: Run) -> list[str]:
    pairs = {
        "sampler": (run.metrics["sampler"], _SAMPLER),
        "samples": (run.number("num_samples"), _NUM_SAMPLES),
        "images compared with": (run.number("num_reference"), _NUM_SAMPLES),
    }
    if run.metrics["features"] not in INCEPTION:
        pairs["features"] = (run.metrics["features"], INCEPTION[0])
    return [_difference(what, ours, paper) for what, (ours, paper) in pairs.items() if ours != paper]
