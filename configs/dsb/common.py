"""What all Schrödinger bridges share."""

from ml_collections import ConfigDict


def bridge_config() -> ConfigDict:
    """All fields but those of data, final and model; the values are those of the plane."""
    config = ConfigDict({"seed": 0})
    config.bridge = ConfigDict(
        {
            "algorithm": "ipf",  # ipf, imf
            "num_ipf": 20,  # iterations, of two half-bridges each
            "num_steps": 20,
            "ladder": "constant",  # constant, linear, geometric
            "gamma_min": 0.01,
            "gamma_max": 0.01,
            "reference": "ornstein_uhlenbeck",  # ornstein_uhlenbeck, brownian
            "coupling": "reference",  # of the first half-bridge: reference, independent (imf alone)
            "matching": "drift",  # what the network gives: drift, mean
            "warm_start": True,  # begin a half-bridge with the direction's last network, or with a new one
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 1e-3,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "grad_clip": 1.0,
            "cosine_decay": False,  # of lr, to 0 at the end of every half-bridge
        }
    )
    config.training = ConfigDict(
        {
            "n_iters": 500,  # steps of a half-bridge
            "batch_size": 512,
            "cache_size": 10_240,  # chains, in all processes together
            "refresh_freq": 200,  # steps between new chains
            "log_freq": 100,
            "save_freq": 500,
            "keep_half_bridges": False,  # keep the checkpoint at every half-bridge's end
        }
    )
    config.evaluation = ConfigDict(
        {
            "num_samples": 2000,
            "num_sets": 5,  # of so many samples each; the mean over them is reported
            "batch_size": 10_000,
        }
    )
    return config


def image_config(dataset: str, image_size: int, num_channels: int) -> ConfigDict:
    """From images in [−1, 1] to N(0, 1), with a U-Net of DDPM++'s kind."""
    config = bridge_config()
    config.data = ConfigDict(
        {
            "dataset": dataset,
            "class_label": -1,  # one class alone; −1: all
            "path": "",  # of npz and folder
            "root": "downloads",
            "download": False,
            "image_size": image_size,
            "num_channels": num_channels,
            "resize": False,
            "centered": True,
        }
    )
    config.final = ConfigDict({"dataset": "gaussian", "scale": 1.0})
    config.model = ConfigDict(
        {
            "name": "ncsnpp",
            "ema_rate": 0.999,
            "nf": 64,
            "ch_mult": (1, 2, 2),
            "num_res_blocks": 2,
            "attn_resolutions": (),
            "dropout": 0.0,
            "nonlinearity": "swish",
            "conditional": True,
            "embedding_type": "positional",
            "fourier_scale": 16.0,
            "resblock_type": "biggan",
            "resamp_with_conv": True,
            "fir": False,
            "fir_kernel": (1, 3, 3, 1),
            "skip_rescale": True,
            "progressive": "none",
            "progressive_input": "none",
            "progressive_combine": "sum",
            "init_scale": 0.0,
        }
    )
    config.bridge.update(ladder="linear", gamma_min=1e-5, gamma_max=0.1)
    config.evaluation.num_sets = 1
    config.optim.lr = 2e-4
    return config


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
