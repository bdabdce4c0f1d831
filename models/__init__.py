"""Networks, their moving average, and the two parameterisations of a score."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

from torch import nn

from experiment.registry import resolve
from models.ema import EMA
from models.mlp import NoiseConditionalMLP, TimeConditionalMLP, vector_mlp
from models.ncsnv2 import NCSN, NCSNv2
from models.score import (
    ConservativeScore,
    NoiseLevel,
    PreconditionedScore,
    ScoreModel,
    UnconstrainedScore,
    make_score_model,
)
from models.second_order.normalisation import Dropout, set_dropout_keys
from models.second_order.recompute import recompute_activations
from models.unet import DDPM, UNet

__all__ = [
    "EMA",
    "NETWORKS",
    "ConservativeScore",
    "Dropout",
    "NoiseLevel",
    "PreconditionedScore",
    "ScoreModel",
    "UnconstrainedScore",
    "make_network",
    "make_score_model",
    "recompute_activations",
    "set_dropout_keys",
]

# The names are score_sde_pytorch's: ncsnpp is both NCSN++ and DDPM++, which are one network with other options; ncsnv2
# chooses among the three by the size of the images. The networks of points are mlp, of the 2-D examples, and time_mlp;
# vector_mlp is the latter with the options of image models.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ncsnpp": UNet,
    "ddpm": DDPM,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
    "ncsnv2_64": partial(NCSNv2, architecture=64),
    "ncsnv2_128": partial(NCSNv2, architecture=128),
    "ncsnv2_256": partial(NCSNv2, architecture=256),
    "mlp": NoiseConditionalMLP,
    "time_mlp": TimeConditionalMLP,
    "vector_mlp": vector_mlp,
}


def make_network(name: str, options: Mapping[str, object], *, shape: Sequence[int] = (), **more: object) -> nn.Module:
    """A freshly initialised network h(x, label[, class_labels]), raw output (no division by σ).

    A class is given those of the options that its constructor has parameters of that name for.

    Args:
        name: one of ``NETWORKS``, or the import path of a class, e.g. 'my_package.nets:MyUNet'.
        options: the fields of ``config.model``.
        shape: of an item of the data, with the channels first. It gives the options ``num_channels``, ``image_size``, a
            tuple where the data are no square images, and ``dimension``, how many numbers an item has.
        more: further options: what data and process prescribe, such as ``centered``, ``num_levels`` and
            ``condition_channels``, how many channels of a condition follow those of x.

    Raises:
        ValueError: unknown name or option, one that the network lacks, or sizes that do not fit.
    """
    build = resolve(name, NETWORKS, "model.name", nn.Module)
    preset = build.keywords if isinstance(build, partial) else {}
    if shape:
        channels, *size = shape
        square = len(size) == 2 and size[0] == size[1]
        described = dict(image_size=size[0] if square else tuple(size), num_channels=channels, dimension=prod(shape))
        more = described | more
    offered = {**options, **more}
    declared = {field: p for field, p in inspect.signature(build).parameters.items() if field not in preset}
    missing = [field for field, p in declared.items() if p.default is p.empty and field not in offered]
    if missing:
        raise ValueError(f"model.name={name!r}: this network also needs {', '.join(missing)}")
    if offered.get("num_classes") and "num_classes" not in declared:
        raise ValueError(f"model.num_classes={offered['num_classes']}: model.name={name!r} knows no classes")
    if offered.get("condition_channels") and "condition_channels" not in declared:
        raise ValueError(f"model.name={name!r}: takes no conditions, which the data have")
    return build(**{field: offered[field] for field in declared if field in offered})
