"""Evaluation of a run: every stage over all processes, every finished batch kept.

An evaluation depends neither on the number of processes nor, unless a solver that treats the batch as one system is
chosen (scipy, dopri5), on the batch size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import ConfigDict
from torch import Tensor, nn

from checkpoints import (
    CheckpointError,
    check_whole,
    load_score_sde_checkpoint,
    load_state_dict_strictly,
    read_checkpoint,
)
from conservativeness import asymmetry
from data import sets
from evaluation import OWN_BACKEND, sample_quality
from experiment.randomness import SampleGenerators, normal_like
from features.classifier import train_classifier
from features.extraction import FeatureExtractor, Features, key_digest, read_statistics, statistics_file
from features.inception import InceptionFeatures, find_weights
from guidance.conditions import CONDITION_FIELDS
from guidance.measurements import MEASUREMENTS
from likelihood import bits_per_dim
from ode import FIXED
from run_classifier import load_classifier
from run_setup import (
    FREE_IN_EVALUATION,
    Run,
    Runtime,
    checked,
    save_image_grid,
    write_arrays,
    write_text,
)
from sde_lib import expand

__all__ = [
    "compute_stage",
    "draw",
    "evaluate",
    "load_for_evaluation",
    "refuse_public_conservative",
    "run_for_evaluation",
    "sample_stage",
    "sampling_settings",
    "spread",
    "statistics",
    "weights_key",
]

logger = logging.getLogger(__name__)

# Part of the key of every stored evaluation: to be raised when a fix changes what sampling, likelihood or asymmetry
# compute.
_EVALUATION_VERSION = 2


def evaluate(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> dict:
    """Evaluate the moving average of a checkpoint; write and return ``W/eval/metrics.json``.

    Finished stages are kept with a key that names weights, settings and data, and reused only under that key;
    within a stage every finished batch is kept until the stage is done.

    Args:
        config, workdir, runtime: the run.
        checkpoint: one of ours or of score_sde_pytorch; None: the newest in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
    """
    with contextlib.ExitStack() as stack:
        with checked():
            run = run_for_evaluation(config, workdir, runtime, checkpoint)
            step = load_for_evaluation(run, checkpoint)
            if run.config.sampling.condition in MEASUREMENTS:
                raise ValueError(f"sampling.condition={run.config.sampling.condition!r}: only with --mode=sample")
            if runtime.compile and not config.eval.enable_sampling:
                raise ValueError(
                    "--compile: not with eval.enable_sampling=False, for all else that is evaluated differentiates the "
                    "score, which a compiled network is not used for"
                )
            quality = _SampleQuality(run) if config.eval.enable_sampling else None
            stack.enter_context(run.alone("evaluation"))
        return _evaluate(run, step, quality)


def _evaluate(run: Run, step: int, quality: _SampleQuality | None) -> dict:
    config, enabled = run.config, run.config.eval
    metrics: dict = {"checkpoint_step": step, "sampler": _sampler_name(config), "test_images": len(run.test_data)}
    names = "nll_bits_per_dim nll_bits_per_dim_se nfe_likelihood nll_images likelihood asym asym_se nasym nasym_se "
    names += "asym_images asym_levels asym_probes sampling_steps fid kid kid_se "
    names += "inception_score inception_score_std precision recall density coverage nfe_sampling num_samples "
    names += "features feature_test_accuracy reference num_reference backend"
    metrics.update(dict.fromkeys(names.split()))
    if not (run.workdir / "config.json").exists():  # a checkpoint from elsewhere
        run.write_config()
    if enabled.enable_bpd:
        metrics.update(_evaluate_nll(run))
    if enabled.enable_asymmetry:
        metrics.update(_evaluate_asymmetry(run))
    if quality is not None:
        metrics.update(quality.evaluate())
    if run.accelerator.is_main_process:
        write_text(run.workdir / "eval" / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    return metrics


def run_for_evaluation(config: ConfigDict, workdir: str | Path, runtime: Runtime, checkpoint: str | Path | None) -> Run:
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(f"--checkpoint={checkpoint}: no such file")
    return Run(config, workdir, runtime, free_fields=FREE_IN_EVALUATION)


def load_for_evaluation(run: Run, checkpoint: str | Path | None) -> int:
    """Put the averaged weights of a checkpoint into ``run.ema``; return its step."""
    if checkpoint is None:
        state = run.store.load_latest()
        if state is None:
            raise CheckpointError(f"no checkpoint in {run.store.directory}: train first, or give --checkpoint")
        source: object = run.store.path(state["step"])
    else:
        state, source = read_checkpoint(checkpoint), checkpoint
    if "sums" in state:
        check_whole(state, source)
        if checkpoint is None and state.get("data") != run.train_data.fingerprint:
            logger.warning("data.path=%s: other data than those that %s was trained on", run.config.data.path, source)
        load_state_dict_strictly(run.ema.model, state["ema"]["model"], source)
        step = state["step"]
    else:
        refuse_public_conservative(run.config, source)
        step = load_score_sde_checkpoint(source, run.ema.model.network, ema=True, sde=run.sde)
    run.check_agreement("the checkpoint's step", step)
    run.ema.model.to(run.device)
    if run.config.sampling.condition == "class":
        run.classifier = load_classifier(run)
    return step


def refuse_public_conservative(config: ConfigDict, source: object) -> None:
    if config.model.parameterization == "conservative":
        raise CheckpointError(
            f"{source} is in the public format, whose conservative models are ∇(−‖h/σ‖²/(2σ)) and not Eq. 10: "
            "model.parameterization must be unconstrained"
        )


def _sampler_name(config: ConfigDict) -> str:
    sampling = config.sampling
    steps = sampling.num_steps or config.model.num_scales
    guided = f"; {sampling.condition}, weight {sampling.guidance_weight:g}" if sampling.condition else ""
    if sampling.method == "pc":
        corrector, end = sampling.corrector, "" if sampling.noise_removal else ", not denoised"
        if corrector != "none":
            repeats = f", {sampling.n_steps_each} per step" if sampling.n_steps_each > 1 else ""
            corrector += f" (snr {sampling.snr:g}{repeats})"
        return f"PC, {sampling.predictor} + {corrector}, {steps} steps{end}{guided}"
    if sampling.method == "few_step":
        end = "" if sampling.noise_removal else ", not denoised"
        return f"few steps, {sampling.solver} on the EDM grid, {steps} steps{end}{guided}"
    if sampling.solver in FIXED:
        return f"ODE, {sampling.solver}, {steps} steps{guided}"
    return f"ODE, {sampling.solver}, rtol {sampling.rtol:g}, atol {sampling.atol:g}{guided}"


def _likelihood_name(config: ConfigDict) -> str:
    settings = config.likelihood
    several = f", {settings.probes} probes" if settings.probes > 1 and settings.divergence != "exact" else ""
    name = f"{settings.divergence} divergence{several}, {settings.solver}"
    name += " in ln(σ/α)" if settings.time == "log_ratio" else ""
    if settings.solver in FIXED:
        return f"{name}, {settings.num_steps} steps"
    return f"{name}, rtol {settings.rtol:g}, atol {settings.atol:g}"


def compute_stage(
    run: Run, name: str, size: int, settings: dict, compute: Callable[[Tensor], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Per-item arrays of the moving average's weights, kept in W/eval/NAME.npz; see ``_in_parts``.

    ``settings`` are what decides the result beside the weights and the model.
    """
    identity = {
        "version": _EVALUATION_VERSION,
        "stage": name,
        "size": size,
        "seed": run.config.seed,
        "weights": weights_key(run.ema.model),
        "training": {name: run.config.training[name] for name in ("sde", "continuous")},
        # Without classes, which came later, the keys of evaluations are those from before.
        "model": {k: v for k, v in json.loads(run.config.model.to_json()).items() if k != "num_classes" or v},
        "precision": run.runtime.precision,
        **settings,
    }
    if {"scipy", "dopri5"} & {run.config.sampling.solver, run.config.likelihood.solver}:
        identity["batch_size"] = run.config.eval.batch_size  # these integrate a batch as one system
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    return _in_parts(run, run.workdir / "eval" / f"{name}.npz", key, size, compute)


def _in_parts(
    run: Run, path: Path, key: str, size: int, compute: Callable[[Tensor], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Compute per-item arrays for items 0 … size−1 in batches over all processes, keeping finished work.

    ``compute`` maps indices (b,) to arrays of b rows. The result is kept in the file ``path``; the batches on the way
    there in W/eval/parts/. Both carry ``key``, and a file of another key, or a damaged one, is computed again.
    """
    name = path.stem
    batches = sets.epoch_batches(
        size, run.config.eval.batch_size, run.accelerator.process_index, run.accelerator.num_processes
    )
    result = _read_arrays(path, key)
    # All processes must take the same branch even if one cannot read the file.
    if all(gather_object([result is not None])):
        run.report_progress(sum(map(len, batches)))
        return result

    parts = run.workdir / "eval" / "parts" / f"{name}-{key_digest(key)}"
    collected = []
    for indices in run.progress(iterable=batches, desc=f"{name} {run.workdir.name}", unit="batch"):
        part = parts / f"{int(indices[0])}-{int(indices[-1])}.npz"
        arrays = _read_arrays(part, key)
        if arrays is None:
            arrays = compute(indices)
            write_arrays(part, key=key, **arrays)
        run.report_progress(len(indices))
        collected.append(arrays)
    collected = gather_object(collected)
    result = {field: np.concatenate([part[field] for part in collected]) for field in collected[0]}
    if run.accelerator.is_main_process:
        write_arrays(path, key=key, **result)
        shutil.rmtree(parts)
    run.accelerator.wait_for_everyone()
    return result


def weights_key(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None if it is missing, damaged, or stored under another key."""
    if not path.exists():
        return None
    try:
        # Opened here because numpy leaves a damaged file open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            return {field: file[field] for field in file.files if field != "key"}
    except Exception as error:  # numpy and zipfile raise half a dozen unrelated types on damaged files
        logger.warning("%s is damaged (%s) and is computed again", path, error)
        return None


def spread(positions: Tensor, count: int, size: int) -> Tensor:
    """Indices of ``count`` evenly spaced items of ``size``: data sets are often sorted by class."""
    return positions * size // count


def _mean_and_se(values: np.ndarray) -> tuple[float, float]:
    se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), se


def _evaluate_nll(run: Run) -> dict:
    """Bits per dimension of the uniformly dequantised test set, the whole or ``nll_images`` of it.

    An image has the same noise in both cases, so that a part of the test set is a part of the result.
    """
    data, centered = run.test_data, run.config.data.centered
    count = min(run.config.eval.nll_images or len(data), len(data))

    def compute(positions: Tensor) -> dict[str, np.ndarray]:
        indices = spread(positions, count, len(data))
        generator = SampleGenerators((run.config.seed, "likelihood"), indices.tolist())
        images, labels = data.batch(indices)
        x = run.to_model(images, generator, dequantize=True).to(run.device)
        result = run.likelihood(run.score_of_class(labels.to(run.device)), x, generator)
        bits = bits_per_dim(result.log_prob, run.dimension, num_levels=data.num_levels, centered=centered)
        return {"nll_bits_per_dim": bits.cpu().numpy(), "nfe": np.full(len(x), result.nfe)}

    settings = {"data": data.fingerprint, "centered": centered, "likelihood": run.config.likelihood.to_dict()}
    arrays = compute_stage(run, "nll", count, settings, compute)
    mean, se = _mean_and_se(arrays["nll_bits_per_dim"])
    return {
        "nll_bits_per_dim": mean,
        "nll_bits_per_dim_se": se,
        "nll_images": count,
        "nfe_likelihood": float(arrays["nfe"].mean()),
        "likelihood": _likelihood_name(run.config),
    }


def _evaluate_asymmetry(run: Run) -> dict:
    """Asym and NAsym at times i/T, i = 1 … T, over test images perturbed with their own noise."""
    settings, data = run.config.eval, run.test_data
    levels = settings.asym_levels
    images_per_level = min(settings.asym_images or len(data), len(data))
    times = torch.arange(1, levels + 1) / levels * run.sde.end_time

    def compute(items: Tensor) -> dict[str, np.ndarray]:
        indices, level = spread(items // levels, images_per_level, len(data)), items % levels
        generator = SampleGenerators((run.config.seed, "asymmetry"), items.tolist())
        images, labels = data.batch(indices)
        x0 = run.to_model(images, generator, dequantize=run.config.data.uniform_dequantization).to(run.device)
        t = times[level].to(run.device)
        mean, std = run.sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator)
        score = run.score_of_class(labels.to(run.device))
        result = asymmetry(score, xt, t, probes=settings.asym_probes or None, generator=generator)
        return {"asym": result.asym.cpu().numpy(), "nasym": result.nasym.cpu().numpy()}

    identity = {
        "data": data.fingerprint,
        "centered": run.config.data.centered,
        "dequantized": run.config.data.uniform_dequantization,
        "levels": levels,
        "probes": settings.asym_probes,
    }
    arrays = compute_stage(run, "asymmetry_items", images_per_level * levels, identity, compute)
    metrics: dict = {"asym_images": images_per_level, "asym_levels": levels, "asym_probes": settings.asym_probes}
    curves = {"t": times.numpy(), "sigma": run.sde.std(times).numpy()}
    for name in ("asym", "nasym"):
        values = arrays[name].astype(np.float64).reshape(images_per_level, levels)
        # One image gives values at all levels, so images are what is independent.
        metrics[name], metrics[f"{name}_se"] = _mean_and_se(values.mean(1))
        curves[name] = values.mean(0)
        curves[f"{name}_se"] = values.std(0, ddof=1) / math.sqrt(images_per_level)
    if run.accelerator.is_main_process:
        write_arrays(run.workdir / "eval" / "asymmetry.npz", **curves)
    return metrics


def draw(run: Run, indices: Sequence[int], *, progress: bool = False) -> tuple[np.ndarray, float]:
    """Samples number ``indices`` as uint8 levels (B, H, W, C), and network evaluations per sample."""
    generator = SampleGenerators((run.config.seed, "samples"), indices)
    like = torch.zeros((len(indices), *run.train_data.image_shape), device=run.device)
    samples = run.sampler(run.sampling_score(indices), like, generator, progress=progress)
    return run.to_pixels(samples.x).permute(0, 2, 3, 1).cpu().numpy(), samples.nfe


def sample_stage(run: Run) -> dict[str, np.ndarray]:
    def compute(indices: Tensor) -> dict[str, np.ndarray]:
        images, nfe = draw(run, indices.tolist(), progress=run.shows_progress)
        return {"images": images, "nfe": np.full(len(images), nfe)}

    return compute_stage(run, "sample_items", run.config.eval.num_samples, _sample_settings(run), compute)


def _sample_settings(run: Run) -> dict:
    return {
        "sampling": sampling_settings(run),
        "centered": run.config.data.centered,
        "dequantized": run.config.data.uniform_dequantization,
        "num_levels": run.train_data.num_levels,
        "image_shape": run.train_data.image_shape,
    }


def sampling_settings(run: Run) -> dict:
    """What decides samples, beside weights and model; without a condition the keys are those from before there were
    any."""
    settings = run.config.sampling.to_dict()
    if not settings["condition"]:
        return {name: value for name, value in settings.items() if name not in CONDITION_FIELDS}
    return settings if run.classifier is None else {**settings, "classifier": weights_key(run.classifier)}


class _SampleQuality:
    """FID, KID, IS, precision and recall of samples against the training set.

    What could fail only after hours of sampling is checked, and what is small is loaded, on construction.

    Raises:
        ValueError: a field of ``config.eval`` is wrong, or a file that it names.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        settings = run.config.eval
        _check_feature_settings(run)
        if settings.num_samples < 4:
            raise ValueError(f"eval.num_samples={settings.num_samples}: FID and its relatives need at least 4")
        if not settings.stats_path and len(run.train_data) < 4:
            raise ValueError(
                f"data.dataset={run.config.data.dataset!r}: {len(run.train_data)} training image(s); FID and its "
                "relatives need at least 4"
            )
        self.backend = OWN_BACKEND
        if settings.backend == "tfgan" and run.accelerator.is_main_process:  # it computes the metrics
            from features.tfgan import tfgan_backend

            self.backend = tfgan_backend()
        # The classifier is trained later: that is work.
        self.extractor = None if settings.features == "classifier" else _feature_extractor(run)
        self.statistics = None
        if settings.stats_path:
            self.statistics = read_statistics(settings.stats_path, self.extractor.dimension)

    def evaluate(self) -> dict:
        run, config = self.run, self.run.config
        arrays = sample_stage(run)
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        if run.accelerator.is_main_process:
            num_levels = run.train_data.num_levels
            write_arrays(run.workdir / "eval" / "samples.npz", images=arrays["images"], num_levels=num_levels)
            save_image_grid(run.workdir / "eval" / "samples.png", arrays["images"], num_levels)
        extractor = self.extractor or _feature_extractor(run)
        if self.statistics is None:
            path, reference = _training_statistics(run, extractor)
            real, described = reference["pool_3"], "training images"
        else:
            path, real = config.eval.stats_path, self.statistics
            described = Path(path).name
        generated = compute_stage(
            run,
            "sample_features",
            len(images),
            {**_sample_settings(run), "extractor": extractor.key},
            lambda indices: _features(extractor, images[indices]),
        )
        metrics: dict = {
            "nfe_sampling": float(arrays["nfe"].mean()),
            "num_samples": len(images),
            "features": extractor.name,
            "feature_test_accuracy": getattr(extractor, "test_accuracy", None),
            "reference": described,
            "num_reference": len(real),
            "backend": self.backend.name,
        }
        if config.sampling.method == "pc":
            metrics["sampling_steps"] = config.sampling.num_steps or config.model.num_scales
        if run.accelerator.is_main_process:
            # The distances between features are in double precision, which MPS does not have.
            device = "cpu" if run.device.type == "mps" else run.device
            features = Features(generated["pool_3"], generated["logits"])
            metrics.update(sample_quality(real, features, seed=config.seed, device=device, backend=self.backend))
        run.accelerator.wait_for_everyone()
        return metrics


def _check_feature_settings(run: Run) -> None:
    settings = run.config.eval
    for field, allowed in (("features", ("inception", "classifier")), ("backend", ("torch", "tfgan"))):
        if settings[field] not in allowed:
            raise ValueError(f"eval.{field}={settings[field]!r}: allowed are {', '.join(allowed)}")
    if settings.tfhub_inception and settings.backend != "tfgan":
        raise ValueError(f"eval.tfhub_inception={settings.tfhub_inception}: needs --config.eval.backend=tfgan")
    if settings.num_reference and settings.num_reference < 4:
        raise ValueError(
            f"eval.num_reference={settings.num_reference}: FID and its relatives need at least 4, or 0 for all"
        )
    if settings.features == "classifier":
        for field in ("inception_path", "inception_sha256", "stats_path", "tfhub_inception"):
            if settings[field]:
                raise ValueError(f"eval.{field}={settings[field]}: is of Inception, but eval.features='classifier'")
        if run.train_data.num_classes is None:
            raise ValueError(
                f"eval.features='classifier': data.dataset={run.config.data.dataset!r} has no labels to train it on; "
                "use --config.eval.features=inception, or --config.eval.enable_sampling=False and --mode=sample"
            )
    elif settings.tfhub_inception and (settings.inception_path or settings.inception_sha256):
        raise ValueError(
            f"eval.tfhub_inception={settings.tfhub_inception}: takes the place of eval.inception_path and "
            "eval.inception_sha256; leave those empty"
        )


def _feature_extractor(run: Run) -> FeatureExtractor:
    """The extractor that ``config.eval`` asks for; a classifier is trained if it is not in the cache."""
    settings, num_levels = run.config.eval, run.train_data.num_levels
    if settings.tfhub_inception:
        from features.tfgan import TFHubFeatures

        return TFHubFeatures(settings.tfhub_inception, num_levels=num_levels)
    with run.main_process_first():
        if settings.features == "classifier":
            return train_classifier(
                run.train_data,
                run.test_data,
                seed=run.config.seed,
                cache_dir=_cache(run),
                device=run.device,
                progress=run.shows_progress,
            )
        weights = find_weights(settings.inception_path)
    return InceptionFeatures(weights, sha256=settings.inception_sha256, num_levels=num_levels, device=run.device)


def _cache(run: Run) -> Path:
    return Path(run.runtime.cache_dir or run.workdir / "eval" / "cache")


def _features(extractor: FeatureExtractor, images: Tensor) -> dict[str, np.ndarray]:
    pool, logits = extractor(images)
    return {"pool_3": pool.float().cpu().numpy(), "logits": logits.float().cpu().numpy()}


def _training_statistics(run: Run, extractor: FeatureExtractor) -> tuple[Path, dict[str, np.ndarray]]:
    """The file of ``pool_3`` and ``logits`` of the training images that samples are compared with, and its arrays."""
    data = run.train_data
    # Deviation from QCSBM, which takes as many from a shuffled set.
    count = min(run.config.eval.num_reference or len(data), len(data))
    path, key = statistics_file(data, extractor, _cache(run), count)

    def compute(indices: Tensor) -> dict[str, np.ndarray]:
        return _features(extractor, data.batch(spread(indices, count, len(data)))[0])

    return path, _in_parts(run, path, key, count, compute)


def statistics(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> Path:
    """Compute the features of the training images that samples are compared with; return the file that keeps them.

    An evaluation with the same cache finds them there, whatever the model; another one takes the file by
    ``config.eval.stats_path``.

    Raises:
        InvalidRun: bad config, data or working directory, or features that are not to be had.
    """
    with checked():
        if config.eval.stats_path:
            raise ValueError(f"eval.stats_path={config.eval.stats_path}: there is nothing to compute; leave it empty")
        # The statistics are those of the data: what else the working directory holds does not matter.
        run = Run(config, workdir, runtime, free_fields=("",))
        _check_feature_settings(run)
        extractor = _feature_extractor(run)
    return _training_statistics(run, extractor)[0]
