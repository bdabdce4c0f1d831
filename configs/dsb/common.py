"""The fields of Schrödinger bridges, and their check."""

from ml_collections import ConfigDict

from configs import defaults
from configs.fields import Field, check_fields, make_config, with_defaults
from configs.ranges import at_least, choices, fraction, positive

POINT_SETS = ("scurve", "swissroll", "circles", "moons", "checkerboard", "8gaussians", "mixture")
_SETS = (*POINT_SETS, "correlated_gaussian", *defaults.IMAGE_SETS)

# Of all bridges; the defaults are those of the plane.
COMMON = {
    "seed": Field(0, "seed of all randomness", at_least(0, most=2**63 - 1)),
    "bridge.algorithm": Field("ipf", "iterative proportional or iterative Markovian fitting", choices("ipf", "imf")),
    "bridge.num_ipf": Field(20, "iterations, of two half-bridges each", at_least(1)),
    "bridge.num_steps": Field(20, "steps of a chain", at_least(2)),
    "bridge.gamma_min": Field(0.01, "step size at the ends", positive),
    "bridge.gamma_max": Field(0.01, "step size in the middle, up to which they rise linearly", positive),
    "bridge.reference": Field("ornstein_uhlenbeck", "to stay close to", choices("ornstein_uhlenbeck", "brownian")),
    "bridge.coupling": Field("reference", "of the first half-bridge", choices("reference", "independent")),
    "bridge.matching": Field("drift", "what the network gives", choices("drift", "mean")),
    "bridge.warm_start": Field(True, "begin a half-bridge with the direction's last network, or with a new one"),
    **with_defaults(defaults.FIELDS, {"optim.lr": 1e-3, "optim.beta1": 0.9, "optim.eps": 1e-8}),
    "optim.beta2": Field(0.999, "decay of Adam's second moment", fraction),
    "optim.grad_clip": Field(1.0, "largest norm of the gradient", positive),
    "optim.cosine_decay": Field(False, "decay of the learning rate, to 0 at the end of every half-bridge"),
    "training.n_iters": Field(500, "steps of a half-bridge", at_least(1)),
    "training.batch_size": Field(512, "samples of a step, over all processes", at_least(1)),
    "training.cache_size": Field(10_240, "chains, in all processes together", at_least(1)),
    "training.refresh_freq": Field(200, "steps between new chains", at_least(1)),
    "training.log_freq": Field(100, "steps between rows of the log", at_least(1)),
    "training.save_freq": Field(500, "steps between checkpoints", at_least(1)),
    "training.keep_half_bridges": Field(False, "keep the checkpoint at every half-bridge's end"),
    "evaluation.num_samples": Field(2000, "samples of a set", at_least(2)),
    "evaluation.num_sets": Field(5, "sets of so many samples; the mean over them is reported", at_least(1)),
    "evaluation.batch_size": Field(10_000, "samples at once", at_least(1)),
    "data.dataset": Field("scurve", "distribution at one end", choices(*_SETS, or_path=True, any_case=True)),
    "final.dataset": Field("gaussian", "at the other", choices("gaussian", *_SETS, or_path=True, any_case=True)),
    "model.name": Field("time_mlp", "the network", choices("time_mlp", "affine", *defaults.NETWORKS, or_path=True)),
    **with_defaults(defaults.FIELDS, {"model.ema_rate": 0.99}),
}
POINTS = {
    "model.width": Field(128, "units of a layer", at_least(1)),
    "model.depth": Field(3, "hidden layers", at_least(1)),
}
_UNREAD = (
    "random_flip",
    "uniform_dequantization",
    "parameterization",
    "schedule",
    "scale_by_sigma",
    "num_classes",
    "prediction",
)
_UNREAD += ("sigma_min", "sigma_max", "beta_min", "beta_max", "rho", "num_scales")
IMAGES = {
    name: field
    for name, field in defaults.FIELDS.items()
    if name.startswith(("data.", "model.")) and name not in COMMON and name.partition(".")[2] not in _UNREAD
}
IMAGES["data.class_label"] = Field(-1, "the one class to take; -1: all", at_least(-1))
# The Fourier embedding takes a logarithm, but the first edge has the label 0.
IMAGES["model.embedding_type"] = Field("positional", "of the number of the edge", choices("positional"))
IMAGES["model.dropout"] = Field(0.0, "bridges are learned without", choices(0.0))
FIELDS = COMMON | POINTS | IMAGES | {f"final.{n[5:]}": field for n, field in IMAGES.items() if n.startswith("data.")}


def image_config(dataset: str, image_size: int, num_channels: int) -> ConfigDict:
    """From images in [−1, 1] to N(0, 1), with a U-Net of DDPM++'s kind."""
    network = dict(name="ncsnpp", nf=64, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(), ema_rate=0.999)
    overrides = {
        "data": dict(dataset=dataset, image_size=image_size, num_channels=num_channels, centered=True),
        "model": network | dict(fir=False, progressive_input="none"),
        "bridge": dict(gamma_min=1e-5, gamma_max=0.1),
        "evaluation.num_sets": 1,
        "optim.lr": 2e-4,
    }
    return make_config(COMMON | IMAGES, overrides)


def join_classes(config: ConfigDict, pair: str) -> ConfigDict:
    """From images to images, for a ``pair`` FROM-TO of which each is a digit or 'all'; 'all' alone is left as it is.

    Raises:
        ValueError: another pair.
    """
    if pair == "all":
        return config
    labels = {"all": -1, **{str(digit): digit for digit in range(10)}}
    first, _, last = pair.partition("-")
    if first not in labels or last not in labels:
        raise ValueError(f"config argument {pair!r}: allowed are all and FROM-TO, digits or all, e.g. 3-8")
    config.final = config.data.copy_and_resolve_references()
    config.data.class_label, config.final.class_label = labels[first], labels[last]
    return config


def check(config: ConfigDict) -> None:
    """Whether all fields are within their ranges, and go together.

    Raises:
        ValueError: the first that is not.
    """
    check_fields(config, FIELDS, kind="a bridge; those are in configs/dsb")
    if config.bridge.coupling == "independent" and config.bridge.algorithm != "imf":
        raise ValueError("bridge.coupling='independent': IPF starts from the coupling of the reference; only imf can")
    cache_size, batch_size = config.training.cache_size, config.training.batch_size
    if cache_size % batch_size:
        raise ValueError(f"training.cache_size={cache_size}: must be a multiple of training.batch_size={batch_size}")
