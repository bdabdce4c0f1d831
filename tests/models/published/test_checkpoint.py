"""Files in the public format are read strictly, and our networks reproduce the outputs that they came with."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from from_config import create_network
from gpu import NEEDS_CUDA
from public_checkpoints import load_score_sde_checkpoint, read_public

from checkpoints import CheckpointError, read_checkpoint
from experiment.runtime import allow_tf32
from models.published import official_names
from models.published.names import entries

DATA = Path(__file__).parent
GOLDEN = {
    "ve_ncsnpp_cifar10": "configs.ve.cifar10_ncsnpp_continuous",
    "vp_ddpmpp_cifar10": "configs.vp.cifar10_ddpmpp_continuous",
}


def golden_network(name: str, **options):
    config = importlib.import_module(GOLDEN[name]).get_config()
    config.model.update(nf=8, num_res_blocks=1, dropout=0.0)
    config.model.update(options)
    return create_network(config).eval()


def golden_output(name: str, network: torch.nn.Module, arrays) -> torch.Tensor:
    device = next(network.parameters()).device
    x, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["labels"])
    with torch.no_grad():
        output = network(x.to(device), labels.to(device)).cpu()
    # The stored outputs of VE include the division by sigma, which here belongs to the score.
    return output / labels[:, None, None, None] if name.startswith("ve") else output


def relative_error(output: torch.Tensor, reference: np.ndarray) -> float:
    reference = torch.from_numpy(reference)
    return float(((output - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_averages_reproduce_their_outputs(name, device):
    allow_tf32(False)
    arrays = np.load(DATA / f"{name}_io.npz", allow_pickle=False)
    network = golden_network(name)
    assert load_score_sde_checkpoint(DATA / f"{name}.pth", network, ema=True) == 123
    assert relative_error(golden_output(name, network.to(device), arrays), arrays["out_ema"]) < 1e-4


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_raw_weights(name):
    """`out` was made with the raw weights, but what the files store as raw weights equals their averages, which are
    1.01 times larger. Undoing that factor reproduces `out`; reading the file as it is cannot."""
    arrays = np.load(DATA / f"{name}_io.npz", allow_pickle=False)
    checkpoint = read_checkpoint(DATA / f"{name}.pth")
    network, averaged = golden_network(name), golden_network(name)
    load_score_sde_checkpoint(DATA / f"{name}.pth", network, ema=False)
    load_score_sde_checkpoint(DATA / f"{name}.pth", averaged, ema=True)
    for own, official in official_names(network).items():
        stored = checkpoint["model"][f"module.{official}"]
        weight = network.state_dict()[own]
        assert torch.equal(weight.flatten(), (stored.t() if ".NIN_" in official else stored).flatten()), own
        assert torch.equal(weight, averaged.state_dict()[own]), own
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.div_(1.01)
    assert relative_error(golden_output(name, network, arrays), arrays["out"]) < 1e-4


def test_averages_and_raw_weights_are_told_apart(tmp_path):
    name = "vp_ddpmpp_cifar10"
    checkpoint = read_checkpoint(DATA / f"{name}.pth")
    checkpoint["ema"]["shadow_params"] = [2 * p for p in checkpoint["ema"]["shadow_params"]]
    torch.save(checkpoint, tmp_path / "doubled.pth")
    raw, averaged = golden_network(name), golden_network(name)
    load_score_sde_checkpoint(tmp_path / "doubled.pth", raw, ema=False)
    load_score_sde_checkpoint(tmp_path / "doubled.pth", averaged, ema=True)
    for (key, a), b in zip(raw.named_parameters(), averaged.parameters(), strict=True):
        assert torch.equal(2 * a, b), key


@pytest.mark.parametrize(
    "options",
    [
        dict(resblock_type="ddpm", fir=False, resamp_with_conv=True),
        dict(resblock_type="ddpm", fir=True, resamp_with_conv=True),
        dict(resblock_type="ddpm", fir=False, resamp_with_conv=False),
        dict(progressive="output_skip", progressive_input="input_skip"),
        dict(progressive="output_skip", progressive_input="input_skip", progressive_combine="cat", fir=False),
        dict(progressive="residual", progressive_input="none"),
        dict(conditional=False),
    ],
    ids=str,
)
def test_official_module_numbers(options):
    """The public network numbers its modules in the order of construction; recomputed here from its rules."""
    network = golden_network("ve_ncsnpp_cifar10", **options)
    model = dict(resblock_type="biggan", progressive="none", progressive_input="residual", conditional=True) | options
    ddpm, attention_levels, levels = model["resblock_type"] == "ddpm", (1,), 4
    kinds = ["fourier"] + ["linear", "linear"] * model["conditional"] + ["conv"]
    for level in range(levels):
        kinds += ["block"] + ["attention"] * (level in attention_levels)
        if level < levels - 1:
            kinds += ["resample" if ddpm else "block"]
            kinds += {"none": [], "input_skip": ["combine"], "residual": ["resample"]}[model["progressive_input"]]
    kinds += ["block", "attention", "block"]
    for level in reversed(range(levels)):
        kinds += ["block", "block"] + ["attention"] * (level in attention_levels)
        if model["progressive"] == "output_skip":
            kinds += ["norm", "conv"]
        elif model["progressive"] == "residual":
            kinds += ["norm", "conv"] if level == levels - 1 else ["resample"]
        if level:
            kinds += ["resample" if ddpm else "block"]
    if model["progressive"] != "output_skip":
        kinds += ["norm", "conv"]
    classes = {
        "FourierEmbedding": "fourier",
        "Linear": "linear",
        "Conv2d": "conv",
        "GroupNorm": "norm",
        "BigGANBlock": "block",
        "DDPMBlock": "block",
        "Attention": "attention",
        "Combine": "combine",
    }
    ours = [classes.get(type(module).__name__, "resample") for _, module in entries(network)]
    assert ours == kinds
    assert set(official_names(network)) == {name for name, _ in network.named_parameters()}


def test_another_architecture_is_refused_and_changes_nothing():
    network = golden_network("ve_ncsnpp_cifar10", nf=16)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another architecture: stem|another architecture: embedding"):
        load_score_sde_checkpoint(DATA / "ve_ncsnpp_cifar10.pth", network, ema=False)
    with pytest.raises(CheckpointError, match=r"another architecture.* and [0-9]+ more"):
        load_score_sde_checkpoint(DATA / "vp_ddpmpp_cifar10.pth", network, ema=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_foreign_files_are_named(tmp_path):
    for content, message in (
        ({"weights": 1}, r"missing, or of another form: model, ema.shadow_params, ema.num_updates, step$"),
        ([1, 2], "holds a list that is none of NCSN's"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            read_public(tmp_path / "other.pth")


def test_truncated_public_checkpoint_is_refused(tmp_path):
    """The error names the file."""
    shutil.copy(DATA / "ve_ncsnpp_cifar10.pth", tmp_path / "cut.pth")
    with open(tmp_path / "cut.pth", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        load_score_sde_checkpoint(tmp_path / "cut.pth", golden_network("ve_ncsnpp_cifar10"), ema=True)
