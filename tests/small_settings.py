"""Settings of models so small that a run takes about a second, with every kind of step in it."""

import pytest

import features.classifier
from configs import digits
from configs.fields import apply
from qc_study import arms, measures, plane
from qc_study.arms import COMMON, PARTS, Part

PLANE = {
    "data.num_train": 200,
    "data.num_test": 60,
    "training.batch_size": 50,
    "training.n_iters": 6,
    "training.log_freq": 2,
    "training.save_freq": 3,
}
BRIDGE = {
    "bridge.num_ipf": 2,
    "bridge.num_steps": 5,
    "model.width": 8,
    "model.depth": 1,
    "training.n_iters": 10,
    "training.batch_size": 8,
    "training.cache_size": 32,
    "training.refresh_freq": 4,
    "training.log_freq": 5,
    "training.save_freq": 3,
    "evaluation.num_samples": 20,
    "evaluation.num_sets": 2,
    "evaluation.batch_size": 12,
}
STUDY = {
    "model": dict(nf=8, ch_mult=(1,), attn_resolutions=(), ema_rate=0.5),
    "training": dict(batch_size=8, log_freq=1),
    "optim.warmup": 0,
    "likelihood": dict(num_steps=4, probes=1),
    "eval": dict(num_samples=30, nll_images=12, asym_levels=2, asym_images=2, asym_probes=1, batch_size=30),
}


def small_part() -> Part:
    """A part of the study of QC."""
    return Part(apply(digits.get_config("u"), COMMON, STUDY), (4,), 2, (0.02,), 2, 4)


def small_study(patch: pytest.MonkeyPatch) -> None:
    """Make the parts on digits and in the plane small."""

    def plane_config(name: str):
        config = get_config(name)
        config.update_from_flattened_dict(PLANE)
        return config

    get_config = plane.configs.get_config
    patch.setattr(plane.configs, "get_config", plane_config)
    patch.setattr(plane.configs, "DATASETS", {"gaussian_8": plane.configs.DATASETS["gaussian_8"]})
    patch.setattr(plane, "SEEDS", 2)
    patch.setattr(plane, "POINTS", 21)
    patch.setitem(PARTS, "digits", small_part)
    for name, value in {"ROUNDS": 1, "PILOT_STEPS": 2, "PLACEBO_WEIGHTS": (1e-3, 1e-2, 1e-1)}.items():
        patch.setattr(arms, name, value)
    patch.setattr(measures, "PATH_STEPS", 5)
    for name in ("LEVELS", "CURVE_LEVELS", "POINTS", "DRAWS", "DRAW_STEPS"):
        patch.setattr(measures, name, 2)
    patch.setitem(measures.SAMPLERS, "pc", dict(method="pc", num_steps=3))
    patch.setitem(measures.SAMPLERS, "ode", dict(method="ode", solver="heun", num_steps=3))
    patch.setitem(measures.SAMPLERS, "few_step", dict(method="few_step", solver="dpmpp_2m_sde", num_steps=3))
    patch.setattr(features.classifier, "_IMAGES_SEEN", 1)
