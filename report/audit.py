"""How conservative models are, and how likely they make the data: several models side by side, published ones too.

Each is asked on the same test images, with the same noise at the same noise-to-signal ratios σ/α, in units of images in
[−1, 1], and with the same probes, so that the differences between two models are those of pairs. NAsym and σ⁴ Asym do
not depend on the units of the images; Asym itself is 16 times as large for images in [0, 1] as in [−1, 1].
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import stats

from configs.checks import check
from data import Split
from data.format import is_picture
from data.sets import conditions_of, evenly_spaced
from experiment.figures import curve_style, new_figure
from experiment.files import check_folder
from experiment.randomness import SampleGenerators, normal_like
from experiment.results import markdown_table, mean_and_error, number, with_error, write_results
from experiment.runtime import InvalidRun, Runtime, checked
from likelihood import LIKELIHOOD_EPS
from run_lib import (
    TrainedScore,
    build_sampler,
    evaluate_nll,
    evaluate_samples,
    in_all_processes,
    load,
    load_data,
    read_once,
)
from sde_lib import expand

__all__ = ["audit"]

logger = logging.getLogger(__name__)

QUANTITIES = {"nasym": "NAsym", "scaled_asym": "σ⁴ Asym", "bits_per_dim": "bits/dim"}
LEAST_RATIO = 1e-3
"""Of σ/α: an eighth of the distance between two of 256 grey levels."""
QUALITY = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall"}


@in_all_processes
def audit(config: ConfigDict, workdir: str | Path, runtime: Runtime, models: str) -> str:
    """Measure models, and write W/audit/results.json, table.md and audit.png; return the table.

    What is measured and how is that of an evaluation, ``config.eval``, ``config.likelihood`` and ``config.seed``; the
    levels are equally spaced in the logarithm of σ/α. Finished batches are kept in W/eval/stages/, as there.

    Args:
        config: of the data and of what is measured; and of models that do not say themselves what they are.
        workdir: W.
        models: what ``run_lib.load`` reads, separated by commas; the others are compared with the first.

    Raises:
        InvalidRun: bad config, data, workdir or model.
        FloatingPointError: something of what is measured is not finite.
    """
    workdir, names = Path(workdir), models.split(",")
    with contextlib.ExitStack() as stack:
        with checked():
            check(config)
            check_folder(workdir)
            if len(set(names)) < len(names):
                raise ValueError(f"--model={models}: one of them stands there twice")
            _, data = train_and_test = load_data(config, runtime)
            if config.eval.enable_bpd and data.num_levels is None:
                raise ValueError(
                    f"eval.enable_bpd=True: audits count the bits of levels, and {data.name} has floating-point numbers"
                )
            read_once(data, runtime)
            scores = {name: _load(name, config, data, workdir, runtime) for name in names}
            quality = None
            if config.eval.enable_sampling and is_picture(data):
                from features.quality import SampleQuality

                cache_dir = Path(runtime.cache_dir or workdir / "eval" / "cache")
                quality = SampleQuality(config.eval, *train_and_test, cache_dir, runtime, seed=config.seed)
            ratios = _common_ratios(scores, config.eval.asym_levels)
            stack.enter_context(runtime.exclusive(workdir / ".audit.lock"))
        measured: dict[str, dict] = {}
        images: dict[str, dict[str, np.ndarray]] = {}
        for name, score in scores.items():
            logger.info("%s: %s", name, _description(score))
            measured[name], images[name] = _measure(score, data, ratios, quality)
        results = {
            "images": {"data": data.name, "fingerprint": data.fingerprint, "test_images": len(data)},
            "noise_to_signal": ratios.tolist(),
            "models": measured,
            "differences": _differences(images),
        }
        if not runtime.is_main:
            return ""
        figures = {"audit": _figure(ratios, measured)} if config.eval.enable_asymmetry else None
        return write_results(workdir / "audit", results, _table(results), figures)


def _load(name: str, config: ConfigDict, data: Split, workdir: Path, runtime: Runtime) -> TrainedScore:
    """A model, asked as ``config`` says."""
    path = Path(name)
    # What says itself what it is, config and all: a run, one of its checkpoints, an exported model.
    whole = (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    own = path.suffix == ".pt" or (whole and (path / "config.json").is_file())
    try:
        score = load(name, device=str(runtime.torch_device), config=None if own else config)
        score.take_levels_of(data)
        score.conditions = conditions_of(data)
    except ValueError as error:
        raise InvalidRun(f"--model={name}: {error}") from error
    settings = ConfigDict(score.config.to_dict())
    settings.update(seed=config.seed, eval=config.eval, likelihood=config.likelihood)
    score.config, score.runtime, score.workdir = settings, runtime, workdir
    return score


def _unit(score: TrainedScore) -> float:
    """The length in [−1, 1] of one in the range of a model's images."""
    return 1.0 if score.images.centered else 2.0


def _range(score: TrainedScore) -> tuple[float, float]:
    """The least and the largest σ/α of a model, in units of images in [−1, 1]."""
    t = torch.tensor([LIKELIHOOD_EPS, score.sde.end_time], dtype=torch.float64)
    least, most = (_unit(score) * score.sde.std(t) / score.sde.mean_coefficient(t)).tolist()
    return least, most


def _common_ratios(scores: dict[str, TrainedScore], levels: int) -> np.ndarray:
    """Values of σ/α that all models know, and at least the smallest of interest (levels,)."""
    lowest, highest = zip(*map(_range, scores.values()), strict=True)
    if not max(*lowest, LEAST_RATIO) < min(highest):
        raise ValueError(f"--model={','.join(scores)}: they have no noise level in common")
    return np.geomspace(max(*lowest, LEAST_RATIO), min(highest), levels)


def _description(score: TrainedScore) -> str:
    """The process, what the network predicts, and how it was discretised."""
    prediction = getattr(score.model, "prediction", score.config.model.parameterization)
    num_scales = score.model.noise_level.num_scales
    levels = f", {num_scales} levels, interpolated in log-SNR" if num_scales and score.sde.name == "vp" else ""
    least, most = _range(score)
    return f"{type(score.sde).__name__}, {prediction}{levels}, σ/α {number(least)} to {number(most)}"


def _measure(score: TrainedScore, data: Split, ratios: np.ndarray, quality) -> tuple[dict, dict[str, np.ndarray]]:
    """What a model comes to, and its values by image (N,)."""
    enabled = score.config.eval
    measured: dict = {"model": _description(score), "parameters": sum(p.numel() for p in score.model.parameters())}
    by_image: dict[str, np.ndarray] = {}
    if enabled.enable_asymmetry:
        arrays = _asymmetries(score, data, ratios)
        for name in ("nasym", "scaled_asym"):
            values = arrays[name].astype(np.float64).reshape(-1, len(ratios))
            by_image[name] = values.mean(1)
            measured[name], measured[f"{name}_se"] = mean_and_error(by_image[name])
            by_level = [mean_and_error(level) for level in values.T]
            measured[f"{name}_by_level"] = [mean for mean, _ in by_level]
            measured[f"{name}_by_level_se"] = [error for _, error in by_level]
        measured["asym_images"], measured["asym_probes"] = len(by_image["nasym"]), enabled.asym_probes
        measured["seconds"] = float(arrays["seconds"].sum())
    if enabled.enable_bpd:
        metrics, arrays = evaluate_nll(score, data)
        by_image["bits_per_dim"] = arrays["nll_bits_per_dim"]
        measured |= metrics | {"bits_per_dim": metrics["nll_bits_per_dim"]}
        measured["bits_per_dim_se"] = metrics["nll_bits_per_dim_se"]
        measured["num_levels"] = score.images.num_levels
    if quality is not None:
        measured |= evaluate_samples(score, build_sampler(score.config, score.sde), quality)[0]
    return measured, by_image


def _asymmetries(score: TrainedScore, data: Split, ratios: np.ndarray) -> dict[str, np.ndarray]:
    """NAsym, σ⁴ Asym and seconds of every image and level, one after the other (N · levels,)."""
    settings, sde, seed, levels = score.config.eval, score.sde, score.config.seed, len(ratios)
    count = min(settings.asym_images or len(data), len(data))
    times = sde.time_at_noise_ratio(torch.from_numpy(ratios / _unit(score))).clamp(0, sde.end_time).float()

    def compute(items: range) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        indices = evenly_spaced([i // levels for i in items], count, len(data))
        images, labels = data.batch(indices)
        told = dict(class_labels=labels, conditions=score.images.condition_of(data, indices))
        # Streams apart, so that a model which is given dequantised images has the others' noise and probes.
        dequantisation, noise, probes = (
            SampleGenerators((seed, f"audit, {purpose}"), items) for purpose in ("dequantisation", "noise", "probes")
        )
        x0 = score.images.to_model(images, dequantisation).to(score.device)
        t = times[[i % levels for i in items]].to(score.device)
        mean, std = sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, noise)
        result = score.asymmetry(xt, t, probes=settings.asym_probes, generator=probes, **told)
        scaled = (std**4 * result.asym).cpu().numpy()
        seconds = np.full(len(items), (time.perf_counter() - started) / len(items))
        return {"nasym": result.nasym.cpu().numpy(), "scaled_asym": scaled, "seconds": seconds}

    identity = {"data": data.fingerprint, "ratios": ratios.tolist(), "probes": settings.asym_probes}
    return score.stage("audit", count * levels, identity, compute)


def _differences(images: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Of every model but the first: the mean over images of its values less those of the first, the standard error, and
    the 95 % interval of Student's t."""
    (_, reference), *others = images.items()
    found: dict = {}
    for name, values in others:
        found[name] = {}
        for quantity, of_first in reference.items():
            mean, error = mean_and_error(values[quantity].astype(np.float64) - of_first)
            half = None if error is None else error * float(stats.t.ppf(0.975, len(of_first) - 1))
            interval = None if half is None else [mean - half, mean + half]
            found[name][quantity] = {"mean": mean, "se": error, "interval": interval}
    return found


def _table(results: dict) -> str:
    """The models, then their differences, and what the numbers are."""
    models, differences = results["models"], results["differences"]
    quantities = [name for name in QUANTITIES if name in next(iter(models.values()))]
    quality = [name for name in QUALITY if next(iter(models.values())).get(name) is not None]
    nfe = [name for name in ("nfe_likelihood", "nfe_sampling") if name in next(iter(models.values()))]
    header = ["model", "what it is", "parameters", *(QUANTITIES[q] for q in quantities), *(QUALITY[q] for q in quality)]
    header += [name.replace("nfe_", "NFE ") for name in nfe] + ["seconds"] * ("nasym" in quantities)
    rows = [
        [
            name,
            m["model"],
            f"{m['parameters']:,}",
            *(with_error(m[q], m[f"{q}_se"]) for q in quantities),
            *(number(m[q]) for q in quality),
            *(number(m[name], 4) for name in nfe),
            *([number(m["seconds"])] * ("nasym" in quantities)),
        ]
        for name, m in models.items()
    ]
    text = markdown_table(header, rows)
    if differences:
        first = next(iter(models))
        text += f"\nLess those of {first} on the same images, with 95 % intervals:\n"
        rows = [[name, *(_interval(found[q]) for q in quantities)] for name, found in differences.items()]
        text += "\n" + markdown_table(["model", *(QUANTITIES[q] for q in quantities)], rows)
    first = next(iter(models.values()))
    ratios = results["noise_to_signal"]
    notes = []
    if "nasym" in quantities:
        probes = f"{first['asym_probes']} probes" if first["asym_probes"] else "exact Jacobians"
        notes.append(
            f"NAsym and σ⁴ Asym: {first['asym_images']} test images of {results['images']['data']}, {probes}, the mean "
            f"over {len(ratios)} levels of σ/α from {number(ratios[0])} to {number(ratios[-1])} in units of images in "
            "[−1, 1], equally spaced in its logarithm. Neither depends on the units of the images. Seconds are theirs."
        )
    if "bits_per_dim" in quantities:
        notes.append(
            f"bits/dim: {first['nll_images']} test images, uniformly dequantised, (k + u)/L of L = "
            f"{first['num_levels']} levels; −ln p/(D ln 2) of images in [−1, 1] plus log₂(L/2) = "
            f"{number(math.log2(first['num_levels'] / 2))}, with p the density at the model's own least σ/α; "
            f"{first['likelihood']}."
        )
    return text + "".join(f"\n{note}\n" for note in notes)


def _interval(difference: dict) -> str:
    mean, interval = difference["mean"], difference["interval"]
    return number(mean) if interval is None else f"{number(mean)} [{number(interval[0])}, {number(interval[1])}]"


def _figure(ratios: np.ndarray, models: dict[str, dict]) -> Figure:
    """NAsym and σ⁴ Asym against σ/α, with standard errors."""
    figure = new_figure(9.0, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ("nasym", "scaled_asym"), strict=True):
        for k, (model, m) in enumerate(models.items()):
            mean = np.array(m[f"{name}_by_level"])
            error = np.array([0.0 if e is None else e for e in m[f"{name}_by_level_se"]])
            style = curve_style(k, len(ratios))
            axes.plot(ratios, mean, label=model, **style)
            band = np.maximum(mean - error, mean / 10), mean + error
            axes.fill_between(ratios, *band, color=style["color"], alpha=0.25, lw=0)
        above = any(
            max(m[f"{name}_by_level"]) > 0 for m in models.values()
        )  # a conservative model may have 0 everywhere
        scale = "log" if above else "linear"
        axes.set(xscale="log", yscale=scale, xlabel="σ/α, images in [−1, 1]", ylabel=QUANTITIES[name])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
