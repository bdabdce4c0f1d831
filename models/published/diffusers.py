"""Folders of the library diffusers (https://github.com/huggingface/diffusers): a UNet2DModel and its scheduler.

    PATH/model_index.json, PATH/unet/, PATH/scheduler/     what a pipeline saves
    PATH/config.json, PATH/scheduler_config.json           the same in one folder
    PATH/unet                                              of a pipeline; its scheduler is looked for beside it

A DDPM or DDIM scheduler is a ladder of noise levels (``sde_lib.LadderVP``) for images in [−1, 1]; ScoreSdeVe is VE with
a geometric schedule for images in [0, 1], whose network is told σ and divides by it itself. What a scheduler does to
samples on their way (clipping, thresholding, fewer steps) is no part of the model, and not read.

The library is needed for the network alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import CheckpointError, read_checkpoint
from experiment.files import first_line, read_json, write_json, write_text
from experiment.runtime import within_memory
from models.published.safetensors import read_safetensors, write_safetensors

PREFIX = "diffusers:"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LADDERS = ("linear", "scaled_linear", "squaredcos_cap_v2")


class UNet2D(nn.Module):
    """A UNet2DModel as a network h(x, label[, class_labels]), whose attention can be differentiated twice.

    Args:
        architecture: its config.json.
        num_classes: of those that it is given, as the architecture says; it may have one more, which stands for none.

    Raises:
        ValueError: the library is missing, or the architecture is none that it can build.
    """

    def __init__(self, architecture: str, num_classes: int = 0) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
            from diffusers.models.attention_processor import Attention, AttnProcessor
        except ImportError as error:
            raise ValueError(
                f"models of diffusers need the library: pip install -r requirements-published.txt ({first_line(error)})"
            ) from None
        options = {name: value for name, value in json.loads(architecture).items() if name[0] != "_"}
        try:
            with torch.device("meta"):  # what cannot be evaluated is said before any work
                size, labels = options["sample_size"], torch.zeros(1, dtype=torch.int64) if num_classes else None
                image = torch.zeros(1, options.get("in_channels", 3), *(size if isinstance(size, list) else [size] * 2))
                UNet2DModel(**options)(image, torch.zeros(1), labels)
            with within_memory("model.architecture", 2):
                self.unet = UNet2DModel(**options)
        except Exception as error:  # whatever the library says to options that make no network
            raise ValueError(f"model.architecture: the library cannot build it: {first_line(error)}") from error
        for module in self.unet.modules():
            if isinstance(module, Attention):  # the usual processor is torch's fused one, whose derivative has none
                module.set_processor(AttnProcessor())
            elif isinstance(module, nn.Dropout):  # its noise would not be a sample's own
                module.p = 0.0
        self.channels = self.unet.config.in_channels

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        # Behind what a network predicts there may be its variance.
        return self.unet(x, label.to(x.dtype), class_labels, return_dict=False)[0][:, : self.channels]


def find(path: str | Path) -> tuple[Path, Path] | None:
    """The folders of the network and of the scheduler at a path, or of a name on the hub, which is fetched if it begins
    with ``diffusers:``; None if there is no such folder.

    Raises:
        CheckpointError: a network without a scheduler, or of what another network encodes; or a name that cannot be
            fetched.
    """
    name = str(path).removeprefix(PREFIX)
    root = Path(name)
    if str(path).startswith(PREFIX) and not root.exists():
        root = _fetched(name)
    network = next((folder for folder in (root / "unet", root) if _class_name(folder / "config.json")), None)
    if network is None:
        if str(path).startswith(PREFIX) or (root / "model_index.json").exists():
            raise CheckpointError(f"{root}: no config.json of diffusers there, nor in unet/")
        return None
    for path in (root / "model_index.json", network.parent / "model_index.json"):
        parts = read_json(path) if path.is_file() else {}
        if isinstance(parts, dict) and any("vae" in part and parts[part] not in (None, [None, None]) for part in parts):
            raise CheckpointError(f"{path}: a model of what an autoencoder makes of images; read are those of images")
    beside = (root / "scheduler", root, root.parent / "scheduler")
    scheduler = next((folder for folder in beside if (folder / "scheduler_config.json").is_file()), None)
    if scheduler is None:
        raise CheckpointError(
            f"{root}: no scheduler_config.json there, nor in scheduler/, which says what noise it knows"
        )
    return network, scheduler


def _class_name(path: Path) -> str:
    """What the library calls the class of a config; empty if it is none of the library's."""
    if not path.is_file():
        return ""
    config = read_json(path)
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def _fetched(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{PREFIX}{name}: no such folder, nor a name on the hub, OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(name, allow_patterns=["*.json"]))
        for folder in (root / "unet", root):  # of other networks nothing more, which may be much
            if _class_name(folder / "config.json") == "UNet2DModel":
                for weights in (folder / WEIGHTS, folder / PICKLED):
                    if not (folder / WEIGHTS).is_file():
                        snapshot_download(name, allow_patterns=[str(weights.relative_to(root))])
        return root
    except Exception as error:  # of many kinds, without a network or without such a name
        raise CheckpointError(
            f"{PREFIX}{name}: no such folder, and not to be had from the hub: {first_line(error)}"
        ) from None


def fields(network: Path, scheduler: Path) -> dict[str, object]:
    """What a config says of the model in these folders, field by field.

    Raises:
        CheckpointError: another class of network or scheduler, or options that are not understood.
    """
    options = read_json(network / "config.json")
    if (name := options["_class_name"]) != "UNet2DModel":
        raise CheckpointError(f"{network}/config.json: a {name}; read are UNet2DModel")
    size, channels = options.get("sample_size"), options.get("in_channels", 3)
    out_channels = options.get("out_channels", 3)
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    if type(size) is not int or type(channels) is not int:
        raise CheckpointError(f"{network}/config.json: sample_size={size!r}, in_channels={channels!r}: need integers")
    widths, layers = options.get("block_out_channels", ()), options.get("layers_per_block", 2)
    if not isinstance(widths, list | tuple) or len(widths) > 16 or type(layers) is not int or not 1 <= layers <= 100:
        raise CheckpointError(
            f"{network}/config.json: layers_per_block={layers!r}: allowed are 1 to 100, and a list of at most 16 "
            "block_out_channels"
        )
    if out_channels not in (channels, 2 * channels):
        raise CheckpointError(
            f"{network}/config.json: in_channels={channels}, out_channels={out_channels!r}: allowed are as many, or "
            "twice as many, of which the second half is a variance"
        )
    classes, embedded = options.get("num_class_embeds") or 0, options.get("class_embed_type")
    if embedded or type(classes) is not int:
        raise CheckpointError(
            f"{network}/config.json: class_embed_type={embedded!r}, num_class_embeds={classes!r}: read are networks "
            "that are given a class by its number"
        )
    if options.get("time_embedding_type") == "learned":
        raise CheckpointError(f"{network}/config.json: time_embedding_type='learned' knows no noise between two levels")
    found: dict[str, object] = {
        "data.image_size": size,
        "data.num_channels": channels,
        "model.name": f"{__name__}:{UNet2D.__name__}",
        "model.architecture": json.dumps({k: v for k, v in sorted(options.items()) if k != "_name_or_path"}),
        "model.num_classes": classes,
        "model.scale_by_sigma": False,
    }
    given = read_json(scheduler / "scheduler_config.json")
    if not isinstance(given, dict):
        raise CheckpointError(f"{scheduler}/scheduler_config.json is damaged: it holds no object")
    try:
        return found | {"model.scheduler": json.dumps(given, sort_keys=True)} | _process(given)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{scheduler}/scheduler_config.json: {first_line(error)}") from None


def _process(given: Mapping) -> dict[str, object]:
    """The process and the prediction of a scheduler's config."""
    if (name := given.get("_class_name")) == "ScoreSdeVeScheduler":
        return {
            "data.centered": False,
            "training.sde": "vesde",
            "training.continuous": True,
            "model.prediction": "score",
            "model.schedule": "geometric",
            "model.sigma_min": float(given.get("sigma_min", 0.01)),
            "model.sigma_max": float(given.get("sigma_max", 1348.0)),
            "model.num_scales": int(given.get("num_train_timesteps", 2000)),
            "sampling.predictor": "reverse_diffusion",
            "sampling.corrector": "langevin",
            "sampling.snr": float(given.get("snr", 0.15)),
            "sampling.n_steps_each": int(given.get("correct_steps", 1)),
        }
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"a {name}; read are DDPMScheduler, DDIMScheduler, ScoreSdeVeScheduler")
    if (prediction := given.get("prediction_type", "epsilon")) not in PREDICTIONS:
        raise ValueError(f"prediction_type={prediction!r}: allowed are {', '.join(PREDICTIONS)}")
    betas = ladder(given)
    return of_ladder(zero_terminal_snr(betas) if given.get("rescale_betas_zero_snr") else betas, prediction)


def of_ladder(betas: Sequence[float], prediction: str) -> dict[str, object]:
    """What a config says of DDPM's process with these β_i, and of what its network predicts."""
    return {
        "data.centered": True,
        "training.sde": "sde_lib:LadderVP",
        "training.continuous": False,
        "model.prediction": prediction,
        "model.schedule": "",
        "model.betas": tuple(betas),
        "model.num_scales": len(betas),
        "sampling.predictor": "ancestral_sampling",
        "sampling.corrector": "none",
    }


def ladder(given: Mapping) -> tuple[float, ...]:
    """The β_i of a DDPM or DDIM scheduler's config, with its defaults.

    Raises:
        ValueError, TypeError: an unknown ladder, or one that makes none.
    """
    if (betas := given.get("trained_betas")) is not None:
        return tuple(float(beta) for beta in betas)
    kind, levels = given.get("beta_schedule", "linear"), int(given.get("num_train_timesteps", 1000))
    if not 2 <= levels <= 10**6:
        raise ValueError(f"num_train_timesteps={levels}: at least 2, at most 1,000,000")
    if kind not in LADDERS:
        raise ValueError(f"beta_schedule={kind!r}: allowed are {', '.join(LADDERS)}, or trained_betas")
    start, end = float(given.get("beta_start", 1e-4)), float(given.get("beta_end", 0.02))
    if kind == "linear":
        return tuple(torch.linspace(start, end, levels, dtype=torch.float64).tolist())
    if kind == "scaled_linear":
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), levels, dtype=torch.float64)
        return tuple((roots**2).tolist())
    return cosine_ladder(levels)


def cosine_ladder(levels: int, offset: float = 0.008, most: float = 0.999) -> tuple[float, ...]:
    """β_i ≤ ``most`` of ᾱ = cos²(½π (t + offset)/(1 + offset)) at t = i/N: Nichol, Dhariwal (ICML 2021)."""
    time = torch.arange(levels + 1, dtype=torch.float64) / levels
    left = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return tuple((1 - left[1:] / left[:-1]).clamp(max=most).tolist())


def zero_terminal_snr(betas: Sequence[float]) -> tuple[float, ...]:
    """The β_i where √ᾱ has been shifted and scaled so that the last is 0, and without that level, which is noise alone
    and has no log-SNR: Lin, Liu, Li, Yang (WACV 2024)."""
    root = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).sqrt()
    remaining = (root[0] * (root[:-1] - root[-1]) / (root[0] - root[-1])) ** 2
    return tuple((1 - remaining / torch.cat([torch.ones_like(remaining[:1]), remaining[:-1]])).tolist())


# What attention was called by versions of the library that the first published models were written with.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def weights(network: Path) -> dict[str, Tensor]:
    """The weights in a folder, under the names of ``UNet2D``.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    pickled = (network / PICKLED).is_file() and not (network / WEIGHTS).is_file()
    found = read_checkpoint(network / PICKLED) if pickled else read_safetensors(network / WEIGHTS)
    if not (isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())):
        raise CheckpointError(f"{network / PICKLED} holds other things than weights")

    def present(name: str) -> str:
        return re.sub(r"\.(query|key|value|proj_attn)(?=\.\w+$)", lambda match: f".{_FORMER[match[1]]}", f"unet.{name}")

    return {present(name): tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def write(folder: Path, network: UNet2D, scheduler: str) -> None:
    """Write a network, and the config of the scheduler that it was read with, as the folder of a pipeline of the
    library, DDPMPipeline, DDIMPipeline or ScoreSdeVePipeline."""
    given = json.loads(scheduler)
    class_name = given["_class_name"]
    write_safetensors(folder / "unet" / WEIGHTS, network.unet.state_dict())
    write_text(folder / "unet" / "config.json", network.unet.to_json_string())
    write_json(folder / "scheduler" / "scheduler_config.json", given)
    index = {"_class_name": class_name.replace("Scheduler", "Pipeline"), "unet": ["diffusers", "UNet2DModel"]}
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", class_name]})
