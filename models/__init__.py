"""Networks, their moving average, and the two parameterisations of a score, built from a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models.ddpm import DDPM
from models.ema import EMA
from models.mlp import NoiseConditionalMLP
from models.ncsnv2 import NCSN, NCSNv2
from models.score import ConservativeScore, NoiseLevel, ScoreModel, UnconstrainedScore
from models.second_order.recompute import recompute_activations
from models.unet import UNet
from sde_lib import SDE

__all__ = ["EMA", "ConservativeScore", "ScoreModel", "UnconstrainedScore", "create_network", "create_score_model"]


def _unet(config) -> UNet:
    model = config.model
    num_classes = model.get("num_classes", 0)
    if num_classes < 0:
        raise ValueError(f"model.num_classes={num_classes}: at least 0")
    return UNet(
        image_size=config.data.image_size,
        num_channels=config.data.num_channels,
        centered=config.data.centered,
        nf=model.nf,
        ch_mult=tuple(model.ch_mult),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        dropout=model.dropout,
        nonlinearity=model.nonlinearity,
        conditional=model.conditional,
        embedding_type=model.embedding_type,
        fourier_scale=model.fourier_scale,
        resblock_type=model.resblock_type,
        resamp_with_conv=model.resamp_with_conv,
        fir=model.fir,
        fir_kernel=tuple(model.fir_kernel),
        skip_rescale=model.skip_rescale,
        progressive=model.progressive,
        progressive_input=model.progressive_input,
        progressive_combine=model.progressive_combine,
        init_scale=model.init_scale,
        # One more label stands for no class.
        num_classes=num_classes + 1 if num_classes else 0,
    )


def _ddpm(config) -> DDPM:
    model = config.model
    return DDPM(
        image_size=config.data.image_size,
        num_channels=config.data.num_channels,
        centered=config.data.centered,
        nf=model.nf,
        ch_mult=tuple(model.ch_mult),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        dropout=model.dropout,
        nonlinearity=model.nonlinearity,
        conditional=model.conditional,
        resamp_with_conv=model.resamp_with_conv,
    )


def _ncsn(config) -> NCSN:
    if config.training.continuous:
        raise ValueError(
            "training.continuous=True: model.name='ncsn' is conditioned on one of model.num_scales noise levels; set "
            "training.continuous=False"
        )
    return NCSN(num_levels=config.model.num_scales, **_refinenet_options(config))


def _ncsnv2(architecture: int | None, config) -> NCSNv2:
    return NCSNv2(architecture=architecture, **_refinenet_options(config))


def _refinenet_options(config) -> dict:
    return dict(
        image_size=config.data.image_size,
        num_channels=config.data.num_channels,
        centered=config.data.centered,
        nf=config.model.nf,
        nonlinearity=config.model.nonlinearity,
    )


def _mlp(config) -> NoiseConditionalMLP:
    model = config.model
    return NoiseConditionalMLP(2, widths=tuple(model.widths), output_activation=model.output_activation)


# The names are score_sde_pytorch's: ncsnpp is both NCSN++ and DDPM++, which are one network with other options; ncsnv2
# chooses among the three by the size of the images. mlp is the network of the 2-D examples.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ncsnpp": _unet,
    "ddpm": _ddpm,
    "ncsn": _ncsn,
    "ncsnv2": partial(_ncsnv2, None),
    "ncsnv2_64": partial(_ncsnv2, 64),
    "ncsnv2_128": partial(_ncsnv2, 128),
    "ncsnv2_256": partial(_ncsnv2, 256),
    "mlp": _mlp,
}

PARAMETERIZATIONS = ("unconstrained", "conservative")


def create_network(config) -> nn.Module:
    """The network that ``config.model`` describes, freshly initialised, raw output (no division by σ).

    Raises:
        ValueError: unknown ``model.name`` or option, or sizes that do not fit.
    """
    name = config.model.name.lower()
    if name not in NETWORKS:
        raise ValueError(f"model.name={config.model.name!r}: allowed are {', '.join(sorted(NETWORKS))}")
    if name != "ncsnpp" and config.model.get("num_classes", 0):
        raise ValueError(f"model.num_classes={config.model.num_classes}: only model.name='ncsnpp' knows classes")
    return NETWORKS[name](config)


def create_score_model(config, sde: SDE) -> ScoreModel:
    """The score model of ``config.model.parameterization`` around a new network.

    Raises:
        ValueError: unknown parameterisation, or one that contradicts other fields.
    """
    model = config.model
    if model.parameterization not in PARAMETERIZATIONS:
        raise ValueError(
            f"model.parameterization={model.parameterization!r}: allowed are {', '.join(PARAMETERIZATIONS)}"
        )
    if sde.name != "ve" and model.scale_by_sigma:
        raise ValueError(f"model.scale_by_sigma=True: only for VE; a {sde.name} network is divided by σ by its score")
    if sde.name == "ve" and model.parameterization == "conservative" and not model.scale_by_sigma:
        raise ValueError("model.scale_by_sigma=False: a conservative model always divides by σ (Eq. 10)")
    embedding_type = str(model.get("embedding_type", "")).lower()
    if sde.name == "ve" and not config.training.continuous and embedding_type == "fourier":
        # The label of the largest σ is index 0, and the Fourier embedding is of its logarithm.
        raise ValueError("training.continuous=False: a discrete-time VE model needs model.embedding_type='positional'")
    noise_level = NoiseLevel(sde, None if config.training.continuous else model.num_scales)
    network = create_network(config)
    # Not a field of the 2-D examples.
    if config.training.get("activation_checkpointing", False) and not recompute_activations(network):
        raise ValueError(f"training.activation_checkpointing=True: model.name={model.name!r} has no blocks for it")
    if model.parameterization == "conservative":
        return ConservativeScore(network, noise_level)
    divide = sde.name != "ve" or model.scale_by_sigma
    return UnconstrainedScore(network, noise_level, divide_by_sigma=divide)
