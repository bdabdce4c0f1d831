"""Pickles of the code of EDM (Karras, Aittala, Aila, Laine, NeurIPS 2022): networks of DDPM++, NCSN++ and ADM under its
preconditionings.

A file holds objects with the source of their classes, which its own code would execute. Here only their names, their
constructors' arguments and their weights are taken (``data.plain_pickle``); the network is ``models.unet.UNet``, which
is their SongUNet and DhariwalUNet under other names. Any other is refused.

The denoiser is D(x; σ) = c_skip x + c_out F(c_in x; c_noise), of images in [−1, 1] and x = x₀ + σ ε:

=============  ===============  ======================  ==================  ===========================
class          c_skip           c_out                   c_in                c_noise
=============  ===============  ======================  ==================  ===========================
VPPrecond      1                −σ                      1/√(σ² + 1)         999 t, with σ² = e^{B(t)} − 1
VEPrecond      1                σ                       1                   ln σ/2
EDMPrecond     σ_d²/(σ² + σ_d²)  σ σ_d/√(σ² + σ_d²)     1/√(σ² + σ_d²)      ¼ ln σ
iDDPMPrecond   1                −σ                      1/√(σ² + 1)         i of σ² = 1/ᾱ_i − 1
=============  ===============  ======================  ==================  ===========================

The last is DDPM of the cosine ladder: F(αx) is the ε of αx, with α = c_in. As one of discrete time it is read.

Where a network knows classes, the label that stands for none is what it makes of no label, which is trained with
``label_dropout`` alone.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import CheckpointError
from data.plain_pickle import load_plain_pickle
from models import layers
from models.published.diffusers import cosine_ladder, of_ladder
from models.published.names import entries
from models.unet import UNet
from sde_lib import LinearBeta

CONSTANTS = {
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000},
    "VEPrecond": {},
    "EDMPrecond": {"sigma_data": 0.5},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
# Where a file has none, as those of EDMPrecond: the noise that the paper samples with.
SIGMAS = (0.002, 80.0)


class _Fourier(layers.FourierEmbedding):
    """Of c_noise itself, in place of a logarithm."""

    def forward(self, label: Tensor) -> Tensor:
        angle = 2 * math.pi * label[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def _network(options: Mapping, image_size: int, num_channels: int, num_classes: int) -> UNet:
    """The U-Net with these options, and the rest as that code has it."""
    unet = UNet(image_size=image_size, num_channels=num_channels, num_classes=num_classes, centered=True, **options)
    if options["embedding_type"] == "fourier":
        unet.embedding = _Fourier(options["nf"], options["fourier_scale"])
    if options["resblock_type"] == "adm":
        half = options["nf"] // 2
        unet.embedding.frequencies.copy_(10_000.0 ** -(torch.arange(half) / half))
        for norm in filter(lambda module: isinstance(module, nn.GroupNorm), unet.modules()):
            norm.eps = 1e-5
    return unet


class Preconditioned(nn.Module):
    """The denoiser D(x; σ), or of iDDPM the noise F(x; i). ``architecture``: JSON of the preconditioning's class, its
    constants, and the options of the U-Net."""

    def __init__(self, architecture: str, image_size: int, num_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        options = json.loads(architecture)
        self.kind, self.constants = options["class"], options["constants"]
        self.unet = _network(options["unet"], image_size, num_channels, num_classes)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        given = self.constants
        if self.kind == "iDDPMPrecond":
            return self.unet(x, sigma, class_labels)
        if self.kind == "VPPrecond":
            time = LinearBeta(given["beta_min"], given["beta_min"] + given["beta_d"]).time(torch.log1p(sigma**2))
            noise, skip, out, scale = (given["M"] - 1) * time, torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt()
        elif self.kind == "VEPrecond":
            noise, skip, out, scale = torch.log(sigma / 2), torch.ones_like(sigma), sigma, torch.ones_like(sigma)
        else:
            variance, total = given["sigma_data"] ** 2, sigma**2 + given["sigma_data"] ** 2
            noise, skip = torch.log(sigma) / 4, variance / total
            out, scale = sigma * given["sigma_data"] * total.rsqrt(), total.rsqrt()
        skip, out, scale = (c[:, None, None, None] for c in (skip, out, scale))
        return skip * x + out * self.unet(scale * x, noise, class_labels)


# ---------------------------------------------------------------------------------------------------------------
# What stands for the objects of a file


class _Object:
    """An object: the name of its class and its attributes."""

    def __init__(self, class_name: str, state: object = None) -> None:
        self.class_name, self.state = class_name, {}
        self.set_state({} if state is None else state)

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"the state of a {self.class_name} is no dictionary")
        self.state = state

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for part in ("_parameters", "_buffers"):
            for name, tensor in self.state.get(part, {}).items():
                if isinstance(tensor, Tensor):
                    yield prefix + name, tensor
        for name, module in self.state.get("_modules", {}).items():
            if isinstance(module, _Object):
                yield from module.weights(f"{prefix}{name}.")


def _persistent(meta: Mapping) -> _Object:
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise ValueError("an object without the name of its class")
    return _Object(meta["class_name"], meta.get("state"))


def _storage(content: bytes) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that there is a newer class
        storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return torch.tensor([], dtype=storage.dtype).set_(storage.untyped())


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    if math.prod(size) > len(numbers):
        raise ValueError(f"a tensor of shape {size} cannot have {len(numbers)} numbers")
    return numbers.as_strided(size, stride, offset).clone()


class _NumberType:
    """Stands for the type of NumPy's scalars."""

    def __init__(self, code: object, *_: object) -> None:
        if code != "f8":
            raise ValueError(f"a number of NumPy's of type {code!r}; read are those of double precision")

    def set_state(self, state: object) -> None:
        pass


def _number(dtype: object, content: bytes) -> float:
    return float(np.frombuffer(content, "<f8").item())


_STAND_INS = {
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container ModuleDict": lambda: _Object("ModuleDict"),
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage _load_from_bytes": _storage,
    "collections OrderedDict": dict,
    "dnnlib.util EasyDict": dict,
    "builtins set": lambda *_: set(),
    "numpy dtype": _NumberType,
    **{f"numpy.{core}.multiarray scalar": _number for core in ("core", "_core")},
}


# ---------------------------------------------------------------------------------------------------------------
# From a file to a model of ours


def read_edm(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What a config says of the model in a file, and its weights under the names of ``Preconditioned``.

    Raises:
        CheckpointError: the file is missing, damaged, would need more than data to be read, or holds another network.
    """
    try:
        content = load_plain_pickle(path, _STAND_INS)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    try:
        found = content["ema"] if isinstance(content, dict) else content
        return _model(found, path)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no model of EDM's code: {type(error).__name__}: {error}") from error


def _model(found: _Object, path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    kind, given = found.class_name, found.state
    network = given["_modules"]["model"]
    if kind not in CONSTANTS or network.class_name not in DEFAULTS:
        what = f"a {kind} of a {network.class_name}"
        raise CheckpointError(f"{path}: {what}; read are {', '.join(CONSTANTS)} of {' and '.join(DEFAULTS)}")
    options = _options(network, path)
    size, channels, classes = (int(given[name]) for name in ("img_resolution", "img_channels", "label_dim"))
    constants = {name: float(given.get(name, default)) for name, default in CONSTANTS[kind].items()}
    if wrong := [name for name, constant in constants.items() if not 0 < constant < math.inf]:
        raise CheckpointError(f"{path}: a {kind} of {wrong[0]}={constants[wrong[0]]:g}: allowed are positive numbers")
    fields = {
        "data.image_size": size,
        "data.num_channels": channels,
        "model.name": f"{__name__}:{Preconditioned.__name__}",
        "model.architecture": json.dumps({"class": kind, "constants": constants, "unet": options}, sort_keys=True),
        "model.num_classes": classes,
        "training.label_dropout": float(network.state["_init_kwargs"].get("label_dropout", 0)) if classes else 0.0,
        "model.scale_by_sigma": False,
        **_process(kind, constants, given),
        "sampling.method": "few_step",
        "sampling.solver": "heun",
        "sampling.num_steps": 18,
    }
    weights = dict(network.weights())
    if kind == "iDDPMPrecond":  # behind the noise there is its variance
        weights |= {name: tensor[:channels] for name, tensor in weights.items() if re.search(r"(out|aux)_conv\.", name)}
    with torch.device("meta"):
        ours = _network(options, size, channels, classes)
    try:
        translated = _translated(weights, ours)
    except (KeyError, RuntimeError, StopIteration, ValueError) as error:
        raise CheckpointError(f"{path}: its weights are not those of its network: {error}") from error
    return fields, {f"unet.{name}": tensor for name, tensor in translated.items()}


def _process(kind: str, constants: Mapping, given: Mapping) -> dict[str, object]:
    """What a config says of the noise, and of what ``Preconditioned`` predicts."""
    if kind == "iDDPMPrecond":
        levels = int(constants["M"])
        if not 2 <= levels <= 10**6:
            raise ValueError(f"M={levels}: at least 2, at most 1,000,000 levels")
        return of_ladder(cosine_ladder(levels, constants["C_2"], 1 - constants["C_1"]), "epsilon")
    sigmas = (float(given.get(name, 0)) for name in ("sigma_min", "sigma_max"))
    least, most = (own if 0 < own < math.inf else usual for own, usual in zip(sigmas, SIGMAS, strict=True))
    return {
        "data.centered": True,
        "training.sde": "vesde",
        "training.continuous": True,
        "model.prediction": "sample",
        "model.schedule": "polynomial",
        "model.rho": 7.0,
        "model.sigma_min": least,
        "model.sigma_max": most,
    }


DEFAULTS = {
    "SongUNet": dict(model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4, attn_resolutions=(16,)),
    "DhariwalUNet": dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8)),
}


def _options(network: _Object, path: Path) -> dict:
    """The options of our U-Net, of the arguments of theirs."""
    name, adm = network.class_name, network.class_name == "DhariwalUNet"
    given = {"embedding_type": "positional", **DEFAULTS[name], **network.state["_init_kwargs"]}
    fourier, multiples = given["embedding_type"] == "fourier", [int(m) for m in given["channel_mult"]]
    encoder, taps = given.get("encoder_type", "standard"), tuple(given.get("resample_filter", (1, 1)))
    dropout = float(given.get("dropout", 0.1))
    unknown = {
        "embedding_type": given["embedding_type"] not in ("fourier", "positional"),
        "resample_filter": not taps or min(taps) <= 0,
        "dropout": not 0 <= dropout < 1,
        "channel_mult": adm and multiples[:1] != [1],  # of which the first is that of the first layer there
        "channel_mult_emb": given.get("channel_mult_emb", 4) != 4,
        "channel_mult_noise": given.get("channel_mult_noise", 1) != (2 if fourier else 1),
        "encoder_type": encoder not in ("standard", "residual") or (encoder == "residual" and taps == (1, 1)),
        "decoder_type": given.get("decoder_type", "standard") != "standard",
    }
    if refused := [option for option, is_refused in unknown.items() if is_refused]:
        raise CheckpointError(f"{path}: a {name} of {refused[0]}={given.get(refused[0])!r}, which ours has not")
    counts = [int(given["num_blocks"]), len(multiples), *multiples]
    if not (all(1 <= count <= 100 for count in counts) and 1 <= given["model_channels"] <= 2**13):
        raise CheckpointError(f"{path}: a {name} of more than 100 blocks, levels or multiples, or 8192 channels")
    resolutions = [given["img_resolution"] >> level for level in range(len(multiples))]
    return {
        "nf": int(given["model_channels"]),
        "ch_mult": multiples,
        "num_res_blocks": int(given["num_blocks"]),
        "attn_resolutions": [r for r in given["attn_resolutions"] if r in resolutions],
        "dropout": dropout,
        "nonlinearity": "swish",
        "conditional": True,
        "embedding_type": "fourier" if fourier else "positional",
        "fourier_scale": 16.0,
        "resblock_type": "adm" if adm else "biggan",
        "resamp_with_conv": True,
        "fir": taps != (1, 1),
        "fir_kernel": [int(tap) for tap in taps],
        "skip_rescale": not adm,
        "progressive": "none",
        "progressive_input": "residual" if encoder == "residual" else "none",
        "progressive_combine": "sum",
        "init_scale": 0.0,
        "classes_with_noise": not adm,
    }


# What the parts of our modules are called there.
_BLOCK = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "shortcut": "skip"}
_QKV = ("query", "key", "value")


def _translated(given: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """The weights under the names of our U-Net, whose modules come in the same order."""
    places = iter([*dict.fromkeys(name.rpartition(".")[0] for name in given if name.startswith("map_"))])
    order = [place for place in places if place not in ("map_augment", "map_label")]  # of which there is none at t
    order += dict.fromkeys(".".join(name.split(".")[:2]) for name in given if name.startswith(("enc.", "dec.")))
    order += dict.fromkeys(name.rpartition(".")[0] for name in given if name.startswith("out_"))
    translated, remaining = {}, iter(order)
    unread = {name for name in given if not name.startswith("map_augment.") and not name.endswith(".resample_filter")}

    def take(name: str) -> Tensor:
        unread.discard(name)
        return given[name]

    for name, module in entries(network):
        if isinstance(module, nn.Embedding):
            translated[f"{name}.weight"] = _of_classes(take, network.classes_with_noise)
            continue
        if not isinstance(module, layers.Attention):  # that is a part of the block before it
            place = next(remaining)
        for part, _ in module.named_parameters():
            first, _, last = part.rpartition(".")
            if isinstance(module, layers.BigGANBlock):
                found = take(f"{place}.{_BLOCK[first]}.{last}")
            elif isinstance(module, layers.Attention) and first in _QKV:
                joint = take(f"{place}.qkv.{last}")
                found = joint.unflatten(0, (-1, 3))[:, _QKV.index(first)].contiguous()
            elif isinstance(module, layers.Attention):
                found = take(f"{place}.{({'norm': 'norm2', 'out': 'proj'})[first]}.{last}")
            else:
                found = take(f"{place}.{'freqs' if last == 'frequencies' else last}")
            translated[f"{name}.{part}"] = found.float()
    if unread:
        raise ValueError(f"{min(unread)} has no place in it")
    if isinstance(network.middle[0], layers.ADMBlock):  # whose cosines come before the sines
        first = translated["time_mlp.0.weight"]
        translated["time_mlp.0.weight"] = torch.cat(first.chunk(2, 1)[::-1], 1)
    return translated


def _of_classes(take: Callable[[str], Tensor], with_noise: bool) -> Tensor:
    """What is learned of each class, and of none, (K + 1, width)."""
    classes = take("map_label.weight").float().t()
    rows = torch.cat([classes, torch.zeros_like(classes[:1])])
    return len(classes) ** 0.5 * rows + take("map_label.bias").float() if with_noise else rows
