"""What tests build from the config of an image model or a 2-D example."""

from __future__ import annotations

from ml_collections import ConfigDict
from torch import nn

from configs.checks import item_shape
from data import Split, load_dataset
from likelihood import LikelihoodEvaluator
from losses import Objective, make_objective
from models import make_network, make_score_model, recompute_activations
from models.score import ScoreModel
from sampling import Sampler, make_sampler
from sde_lib import SDE, make_sde


def get_sde(config: ConfigDict) -> SDE:
    return make_sde(config.training.sde, config.model.get("schedule", ""), config.model)


def create_network(config: ConfigDict) -> nn.Module:
    data = {"dimension": 2}
    if "image_size" in config.data:
        data = {"shape": item_shape(config.data), "centered": config.data.centered}
    levels = None if config.get("training", {}).get("continuous", True) else config.model.num_scales
    return make_network(config.model.name, config.model, **data, num_levels=levels)


def create_score_model(config: ConfigDict, sde: SDE) -> ScoreModel:
    network = create_network(config)
    if config.training.get("activation_checkpointing", False):
        recompute_activations(network)
    return make_score_model(
        sde,
        network,
        parameterization=config.model.parameterization,
        num_scales=None if config.training.continuous else config.model.num_scales,
        scale_by_sigma=config.model.scale_by_sigma,
    )


def get_objective(config: ConfigDict, score_model: ScoreModel) -> Objective:
    return make_objective(score_model, config.training)


def get_sampler(config: ConfigDict, sde: SDE) -> Sampler:
    num_scales = config.model.get("num_scales", 0)
    return make_sampler(sde, config.sampling, num_scales=num_scales, continuous=config.training.continuous)


def get_likelihood(config: ConfigDict, sde: SDE) -> LikelihoodEvaluator:
    return LikelihoodEvaluator(sde, **config.likelihood)


def get_dataset(config: ConfigDict) -> tuple[Split, Split]:
    names = ("image_size", "num_channels", "path", "root", "download", "resize")
    return load_dataset(config.data.dataset, **{name: config.data[name] for name in names})
