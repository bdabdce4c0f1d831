"""What the public codes call the parameters of our networks.

score_sde_pytorch and QCSBM number the modules of a U-Net in one flat list, ``all_modules.<i>``, in the order of
computation, except that a residual or attention module precedes the pyramid's module of its stage: the order in which
``models.unet`` registers them. The RefineNets of NCSN and NCSNv2 have names for their stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn

from models import layers
from models.ncsnv2 import RefineNet
from models.unet import Combine, UNet

# The modules that are one entry of the list, and what their parts are called there if not the same.
_RESIDUAL = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "time": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
_ENTRIES: dict[type[nn.Module], dict[str, str]] = {
    layers.BigGANBlock: {**_RESIDUAL, "shortcut": "Conv_2"},
    layers.ADMBlock: {},
    layers.DDPMBlock: {**_RESIDUAL, "shortcut": "NIN_0"},
    layers.Attention: {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"},
    Combine: {"conv": "Conv_0"},
    layers.Downsample: {"conv": "Conv_0"},
    layers.Upsample: {"conv": "Conv_0"},
    layers.FIRConvDown: {"conv": "Conv2d_0"},
    layers.FIRConvUp: {"conv": "Conv2d_0"},
    layers.FIRDown: {},
    layers.FIRUp: {},
    layers.FourierEmbedding: {"frequencies": "W"},
}


def entries(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a U-Net that are entries of the list, with our names."""
    if type(module) in _ENTRIES or list(module.parameters(recurse=False)):
        yield name, module
        return
    for child_name, child in module.named_children():
        # What resamples a pyramid is no entry unless it is learned.
        if not child_name.startswith("pyramid_") or list(child.parameters()):
            yield from entries(child, f"{name}.{child_name}" if name else child_name)


def _unet_names(network: nn.Module) -> dict[str, str]:
    names = {}
    for number, (prefix, module) in enumerate(entries(network)):
        for name, _ in module.named_parameters():
            part, *rest = name.split(".")
            part = _ENTRIES.get(type(module), {}).get(part, part)
            if part.startswith("NIN"):
                rest = [{"weight": "W", "bias": "b"}[rest[0]]]
            names[f"{prefix}.{name}"] = ".".join([f"all_modules.{number}", part, *rest])
    return names


# By the number of stages, which the public code calls so in the encoder and so in the decoder.
_STAGES = {4: ("1234", "1234"), 5: ("12345", "12345"), 6: (["1", "2", "3", "31", "4", "5"], ["1", "2", "31", *"345"])}
_REFINENET: dict[str, str | Callable[[re.Match], str]] = {
    r"^stem": "begin_conv",
    r"^norm": "normalizer",
    r"^head": "end_conv",
    r"\.norm(?=[12]\.)": ".normalize",
    r"\.adapt": ".adapt_convs",
    r"\.fusion": ".msf",
    r"\.pooling": ".crp",
    r"\.output": ".output_convs",
    r"\.units\.(\d)\.(\d)\.": lambda match: f".{int(match[1]) + 1}_{int(match[2]) + 1}_",
}


def _refinenet_names(network: nn.Module) -> dict[str, str]:
    encoder, decoder = _STAGES[len(network.encoder)]
    names = {}
    for name, _ in network.named_parameters():
        official = re.sub(r"^encoder\.(\d)", lambda match: f"res{encoder[int(match[1])]}", name)
        official = re.sub(r"^decoder\.(\d)", lambda match: f"refine{decoder[int(match[1])]}", official)
        for pattern, replacement in _REFINENET.items():
            official = re.sub(pattern, replacement, official)
        names[name] = official
    return names


def official_names(network: UNet | RefineNet) -> dict[str, str]:
    """For each of a network's parameters its name in the public state dict, without the prefix ``module.``."""
    return _unet_names(network) if isinstance(network, UNet) else _refinenet_names(network)
