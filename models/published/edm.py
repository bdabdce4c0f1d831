"""Pickles of the code of EDM (Karras, Aittala, Aila, Laine, NeurIPS 2022): networks of DDPM++ and NCSN++ under its
preconditionings.

A file holds objects with the source of their classes, which its own code would execute. Here only their names, their
constructors' arguments and their weights are taken (``data.plain_pickle``); the network is ``models.unet.UNet``, which
is its SongUNet under other names. Any other network is refused.

The denoiser is D(x; σ) = c_skip x + c_out F(c_in x; c_noise), of images in [−1, 1] and x = x₀ + σ ε:

=============  ===============  ======================  ==================  ===========================
class          c_skip           c_out                   c_in                c_noise
=============  ===============  ======================  ==================  ===========================
VPPrecond      1                −σ                      1/√(σ² + 1)         999 t, with σ² = e^{B(t)} − 1
VEPrecond      1                σ                       1                   ln σ/2
EDMPrecond     σ_d²/(σ² + σ_d²)  σ σ_d/√(σ² + σ_d²)     1/√(σ² + σ_d²)      ¼ ln σ
=============  ===============  ======================  ==================  ===========================
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import CheckpointError
from data.plain_pickle import load_plain_pickle
from models import layers
from models.published.names import entries
from models.unet import UNet
from sde_lib import LinearBeta

CONSTANTS = {
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000},
    "VEPrecond": {},
    "EDMPrecond": {"sigma_data": 0.5},
}
# Where a file has none, as those of EDMPrecond: the noise that the paper samples with.
SIGMAS = (0.002, 80.0)


class Preconditioned(nn.Module):
    """The denoiser D(x; σ). ``architecture``: JSON of the preconditioning's class, its constants, and the options of
    the U-Net."""

    def __init__(self, architecture: str, image_size: int, num_channels: int) -> None:
        super().__init__()
        options = json.loads(architecture)
        self.kind, self.constants = options["class"], options["constants"]
        self.unet = UNet(image_size=image_size, num_channels=num_channels, centered=True, **options["unet"])
        self.takes_logarithm = options["unet"]["embedding_type"] == "fourier"

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        given = self.constants
        if self.kind == "VPPrecond":
            time = LinearBeta(given["beta_min"], given["beta_min"] + given["beta_d"]).time(torch.log1p(sigma**2))
            noise, skip, out, scale = (given["M"] - 1) * time, torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt()
        elif self.kind == "VEPrecond":
            noise, skip, out, scale = torch.log(sigma / 2), torch.ones_like(sigma), sigma, torch.ones_like(sigma)
        else:
            variance, total = given["sigma_data"] ** 2, sigma**2 + given["sigma_data"] ** 2
            noise, skip = torch.log(sigma) / 4, variance / total
            out, scale = sigma * given["sigma_data"] * total.rsqrt(), total.rsqrt()
        label = noise.exp() if self.takes_logarithm else noise
        skip, out, scale = (c[:, None, None, None] for c in (skip, out, scale))
        return skip * x + out * self.unet(scale * x, label)


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
    if kind not in CONSTANTS or network.class_name != "SongUNet":
        of = "" if network.class_name == "SongUNet" else f" of a {network.class_name}"
        raise CheckpointError(f"{path}: a {kind}{of}; read are {', '.join(CONSTANTS)} of a SongUNet")
    options = _options(network.state["_init_kwargs"], path)
    size, channels = int(given["img_resolution"]), int(given["img_channels"])
    constants = {name: float(given.get(name, default)) for name, default in CONSTANTS[kind].items()}
    sigmas = (float(given.get(name, 0)) for name in ("sigma_min", "sigma_max"))
    least, most = (own if 0 < own < math.inf else usual for own, usual in zip(sigmas, SIGMAS, strict=True))
    fields = {
        "data.image_size": size,
        "data.num_channels": channels,
        "data.centered": True,
        "training.sde": "vesde",
        "training.continuous": True,
        "model.name": f"{__name__}:{Preconditioned.__name__}",
        "model.architecture": json.dumps({"class": kind, "constants": constants, "unet": options}, sort_keys=True),
        "model.prediction": "sample",
        "model.scale_by_sigma": False,
        "model.schedule": "polynomial",
        "model.rho": 7.0,
        "model.sigma_min": least,
        "model.sigma_max": most,
        "sampling.method": "few_step",
        "sampling.solver": "heun",
        "sampling.num_steps": 18,
    }
    with torch.device("meta"):
        ours = UNet(image_size=size, num_channels=channels, centered=True, **options)
    try:
        translated = _translated(dict(network.weights()), ours)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: its weights are not those of its network: {error}") from error
    return fields, {f"unet.{name}": tensor for name, tensor in translated.items()}


def _options(given: Mapping, path: Path) -> dict:
    """The options of our U-Net, of a SongUNet's arguments."""
    fourier = given.get("embedding_type", "positional") == "fourier"
    encoder, taps = given.get("encoder_type", "standard"), tuple(given.get("resample_filter", (1, 1)))
    unknown = {
        "label_dim": given.get("label_dim", 0) != 0,
        "channel_mult_emb": given.get("channel_mult_emb", 4) != 4,
        "channel_mult_noise": given.get("channel_mult_noise", 1) != (2 if fourier else 1),
        "encoder_type": encoder not in ("standard", "residual") or (encoder == "residual" and taps == (1, 1)),
        "decoder_type": given.get("decoder_type", "standard") != "standard",
    }
    if refused := [name for name, is_refused in unknown.items() if is_refused]:
        raise CheckpointError(f"{path}: a SongUNet of {refused[0]}={given.get(refused[0])!r}, which ours has not")
    size, multiples = given["img_resolution"], [int(m) for m in given.get("channel_mult", (1, 2, 2, 2))]
    counts = [int(given.get("num_blocks", 4)), len(multiples), *multiples]
    if not (all(1 <= count <= 100 for count in counts) and 1 <= given.get("model_channels", 128) <= 2**13):
        raise CheckpointError(f"{path}: a SongUNet of more than 100 blocks, levels or multiples, or 8192 channels")
    resolutions = [size >> level for level in range(len(multiples))]
    return {
        "nf": int(given.get("model_channels", 128)),
        "ch_mult": multiples,
        "num_res_blocks": int(given.get("num_blocks", 4)),
        "attn_resolutions": [r for r in given.get("attn_resolutions", (16,)) if r in resolutions],
        "dropout": float(given.get("dropout", 0.1)),
        "nonlinearity": "swish",
        "conditional": True,
        "embedding_type": "fourier" if fourier else "positional",
        "fourier_scale": 16.0,
        "resblock_type": "biggan",
        "resamp_with_conv": True,
        "fir": taps != (1, 1),
        "fir_kernel": [int(tap) for tap in taps],
        "skip_rescale": True,
        "progressive": "none",
        "progressive_input": "residual" if encoder == "residual" else "none",
        "progressive_combine": "sum",
        "init_scale": 0.0,
    }


# What the parts of our modules are called there.
_BLOCK = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "shortcut": "skip"}
_QKV = ("query", "key", "value")


def _translated(given: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """The weights under the names of our U-Net, whose modules come in the same order."""
    places = iter([*dict.fromkeys(name.rpartition(".")[0] for name in given if name.startswith("map_"))])
    order = [place for place in places if place not in ("map_augment", "map_label")]  # of which there is none at t
    order += dict.fromkeys(".".join(name.split(".")[:2]) for name in given if name.startswith(("enc.", "dec.")))
    translated, remaining = {}, iter(order)
    for name, module in entries(network):
        if not isinstance(module, layers.Attention):  # that is a part of the block before it
            place = next(remaining)
        for part, _ in module.named_parameters():
            first, _, last = part.rpartition(".")
            if isinstance(module, layers.BigGANBlock):
                found = given[f"{place}.{_BLOCK[first]}.{last}"]
            elif isinstance(module, layers.Attention) and first in _QKV:
                joint = given[f"{place}.qkv.{last}"]
                found = joint.unflatten(0, (-1, 3))[:, _QKV.index(first)].contiguous()
            elif isinstance(module, layers.Attention):
                found = given[f"{place}.{({'norm': 'norm2', 'out': 'proj'})[first]}.{last}"]
            else:
                found = given[f"{place}.{'freqs' if last == 'frequencies' else last}"]
            translated[f"{name}.{part}"] = found.float()
    return translated
