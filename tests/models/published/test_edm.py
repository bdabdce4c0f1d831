"""Pickles of EDM: the denoiser is the one that their names and preconditionings define, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traps import Trap

from checkpoints import CheckpointError
from run_lib import load
from sde_lib import expand

CHANNELS, SIZE, MULT, CLASSES = 3, 8, (1, 2), 4
WIDTHS = {"ddpmpp": 8, "ncsnpp": 8, "adm": 64}
X = torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Persistent(nn.Module):
    """An object that is pickled as that code pickles its own: the class by name and source, and all attributes."""

    def __init__(self, class_name: str, **attributes: object) -> None:
        super().__init__()
        self.class_name = class_name
        self.__dict__.update(attributes)

    def __reduce__(self) -> tuple:
        meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=self.class_name)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta | {"state": self.__dict__},)


@pytest.fixture(autouse=True)
def persistence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, without which nothing could be pickled by it; reading must not come to it."""

    def _reconstruct_persistent_obj(meta: dict) -> None:
        pytest.fail("it was called")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


# --------------------------------------------------------------------------------------- the network, from its weights


def blocks(network: str) -> Iterator[tuple[str, str, int, int, bool]]:
    """Name, kind, channels in and out, and attention, in the order of computation; one block per resolution."""
    nf, adm = WIDTHS[network], network == "adm"
    yield "enc.8x8_conv", "conv", CHANNELS, nf, False
    yield "enc.8x8_block0", "block", nf, nf, False
    yield "enc.4x4_down", "down", nf, nf, False
    if network == "ncsnpp":
        yield "enc.4x4_aux_residual", "residual", CHANNELS, nf, False
    yield "enc.4x4_block0", "block", nf, 2 * nf, True
    yield "dec.4x4_in0", "block", 2 * nf, 2 * nf, True
    yield "dec.4x4_in1", "block", 2 * nf, 2 * nf, False
    yield "dec.4x4_block0", "block", 4 * nf, 2 * nf, adm
    yield "dec.4x4_block1", "block", 3 * nf, 2 * nf, True
    yield "dec.8x8_up", "up", 2 * nf, 2 * nf, False
    yield "dec.8x8_block0", "block", 3 * nf, nf, False
    yield "dec.8x8_block1", "block", 2 * nf, nf, False
    yield "out_norm" if adm else "dec.8x8_aux_norm", "norm", nf, nf, False
    yield "out_conv" if adm else "dec.8x8_aux_conv", "conv", nf, CHANNELS, False


def random_weights(network: str, variance: bool, classes: int) -> dict[str, Tensor]:
    nf, adm = WIDTHS[network], network == "adm"
    width = 2 * nf if network == "ncsnpp" else nf
    shapes: dict[str, tuple[int, ...]] = {"map_noise.freqs": (nf,)} if network == "ncsnpp" else {}
    shapes |= {"map_augment.weight": (width, 9)}
    for name, inputs in (("map_layer0", width), ("map_layer1", 4 * nf)):
        shapes |= {f"{name}.weight": (4 * nf, inputs), f"{name}.bias": (4 * nf,)}
    if classes:
        shapes |= {"map_label.weight": (4 * nf if adm else width, classes)} | (
            {} if adm else {"map_label.bias": (width,)}
        )

    def convolution(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)})

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    for name, kind, inputs, outputs, attention in blocks(network):
        if kind in ("conv", "residual"):
            convolution(name, inputs, outputs * (2 if variance and name == "out_conv" else 1), 3)
        elif kind == "norm":
            norm(name, inputs)
        else:
            norm(f"{name}.norm0", inputs)
            convolution(f"{name}.conv0", inputs, outputs, 3)
            modulated = 2 * outputs if adm else outputs
            shapes |= {f"{name}.affine.weight": (modulated, 4 * nf), f"{name}.affine.bias": (modulated,)}
            norm(f"{name}.norm1", outputs)
            convolution(f"{name}.conv1", outputs, outputs, 3)
            if inputs != outputs or (kind != "block" and not adm):
                convolution(f"{name}.skip", inputs, outputs, 1)
            if attention:
                norm(f"{name}.norm2", outputs)
                convolution(f"{name}.qkv", outputs, 3 * outputs, 1)
                convolution(f"{name}.proj", outputs, outputs, 1)
    generator = torch.Generator().manual_seed(2)
    return {
        name: min(0.3, max(shape[1:], default=1) ** -0.5) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def unet(w: dict[str, Tensor], x: Tensor, noise: Tensor, network: str, labels: Tensor | None) -> Tensor:
    """F(x; c_noise) in double precision, written down anew from what the layers are."""
    w, x, noise = {name: tensor.double() for name, tensor in w.items()}, x.double(), noise.double()
    nf, adm, residual = WIDTHS[network], network == "adm", network == "ncsnpp"
    taps = torch.tensor([1.0, 3, 3, 1] if residual else [1.0, 1], dtype=torch.float64)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2

    def filtered(x: Tensor, *, up: bool) -> Tensor:
        weight, options = kernel.expand(x.shape[1], 1, -1, -1), dict(groups=x.shape[1], stride=2)
        options["padding"] = (len(taps) - 1) // 2
        return F.conv_transpose2d(x, 4 * weight, **options) if up else F.conv2d(x, weight, **options)

    def normalised(name: str, x: Tensor) -> Tensor:
        groups = min(x.shape[1] // 4, 32)
        return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5 if adm else 1e-6)

    def convolved(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)

    def block(name: str, kind: str, x: Tensor, attention: bool) -> Tensor:
        h, rest = F.silu(normalised(f"{name}.norm0", x)), x
        if kind != "block":
            h, rest = filtered(h, up=kind == "up"), filtered(x, up=kind == "up")
        h = convolved(f"{name}.conv0", h, 1)
        of_noise = F.linear(emb, w[f"{name}.affine.weight"], w[f"{name}.affine.bias"])[:, :, None, None]
        if adm:
            c = h.shape[1]
            h = (1 + of_noise[:, :c]) * normalised(f"{name}.norm1", h) + of_noise[:, c:]
        else:
            h = normalised(f"{name}.norm1", h + of_noise)
        h = convolved(f"{name}.conv1", F.silu(h), 1)
        rest = convolved(f"{name}.skip", rest) if f"{name}.skip.weight" in w else rest
        x = (rest + h) * scale
        if attention:
            b, c, height, width = x.shape
            heads = c // 64 if adm else 1
            joint = convolved(f"{name}.qkv", normalised(f"{name}.norm2", x))
            q, k, v = joint.reshape(b, heads, c // heads, 3, -1).unbind(3)
            weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / (c // heads) ** 0.5, dim=3)
            mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, c, height, width)
            x = (x + convolved(f"{name}.proj", mixed)) * scale
        return x

    scale, of_class = 1.0 if adm else 0.5**0.5, torch.zeros(len(x), 1, dtype=x.dtype)
    if labels is not None:
        chosen = F.one_hot(labels, CLASSES + 1)[:, :CLASSES].double()
        of_class = chosen @ w["map_label.weight"].T
        of_class = of_class if adm else CLASSES**0.5 * of_class + w["map_label.bias"]

    if residual:
        angle = 2 * np.pi * noise[:, None] * w["map_noise.freqs"]
    else:
        angle = noise[:, None] * 10_000.0 ** -(torch.arange(nf // 2).double() / (nf // 2 - (0 if adm else 1)))
    emb = torch.cat([angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()], 1)
    for name, added in (("map_layer0", 0 if adm else of_class), ("map_layer1", 0)):
        emb = F.linear(emb + added, w[f"{name}.weight"], w[f"{name}.bias"])
        emb = F.silu(emb + of_class if adm and name == "map_layer1" else emb)
    skips: list[Tensor] = []
    image = x
    for name, kind, inputs, _, attention in blocks(network):
        if kind == "residual":
            wide = convolved(name, image, 2) - w[f"{name}.bias"][:, None, None]
            down = F.conv2d(wide, kernel.expand(wide.shape[1], 1, -1, -1), groups=wide.shape[1], stride=2)
            x = skips[-1] = image = (x + down + w[f"{name}.bias"][:, None, None]) / 2**0.5
        elif kind == "norm":
            x = F.silu(normalised(name, x))
        elif kind == "conv":
            x = convolved(name, x, 1)
        else:
            x = torch.cat([x, skips.pop()], 1) if name.startswith("dec") and x.shape[1] != inputs else x
            x = block(name, kind, x, attention)
        if name.startswith("enc") and kind != "residual":
            skips.append(x)
    return x


def saved(path: Path, kind: str, network: str, classes: int = 0, **changes: object) -> dict[str, Tensor]:
    """A file as that code writes it; its weights."""
    weights = random_weights(network, kind == "iDDPMPrecond", classes)
    options = dict(model_channels=WIDTHS[network], channel_mult=[*MULT], num_blocks=1, attn_resolutions=[4])
    options |= dict(img_resolution=SIZE, in_channels=CHANNELS, out_channels=CHANNELS, dropout=np.float64(0.1))
    options |= dict(label_dim=classes, augment_dim=9)
    if network == "ncsnpp":
        options |= dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2)
        options |= dict(resample_filter=[1, 3, 3, 1])
    name = changes.pop("class_name", "DhariwalUNet" if network == "adm" else "SongUNet")
    model = Persistent(name, _init_args=(), _init_kwargs=options | changes, skip_scale=np.sqrt(0.5))
    for name, tensor in weights.items():
        parent, (*parts, leaf) = model, name.split(".")
        for depth, part in enumerate(parts):
            if part not in parent._modules:
                parent.add_module(part, nn.ModuleDict() if part in ("enc", "dec") and not depth else Persistent("Part"))
            parent = parent._modules[part]
        if leaf == "freqs":
            parent.register_buffer(leaf, tensor)
        else:
            parent.register_parameter(leaf, nn.Parameter(tensor))
    noise = dict(sigma_min=0.02, sigma_max=100.0) if kind == "VEPrecond" else dict(sigma_min=0, sigma_max=float("inf"))
    constants = dict(beta_d=19.9, beta_min=0.1, M=1000) if kind == "VPPrecond" else {}
    constants["sigma_data"] = changes.get("sigma_data", 0.5)
    outer = Persistent(kind, img_resolution=SIZE, img_channels=CHANNELS, label_dim=classes, **noise, **constants)
    outer.add_module("model", model)
    path.write_bytes(pickle.dumps({"ema": outer, "loss_fn": Persistent("EDMLoss"), "dataset_kwargs": {"path": "x"}}))
    return weights


@pytest.mark.parametrize(
    ("kind", "network", "classes"),
    [
        ("EDMPrecond", "ncsnpp", 0),
        pytest.param("EDMPrecond", "ddpmpp", 0, marks=pytest.mark.slow),
        ("VPPrecond", "ddpmpp", CLASSES),
        pytest.param("VEPrecond", "ncsnpp", CLASSES, marks=pytest.mark.slow),
        ("EDMPrecond", "adm", CLASSES),
        pytest.param("VEPrecond", "adm", 0, marks=pytest.mark.slow),
    ],
)
def test_denoisers(kind: str, network: str, classes: int, tmp_path: Path) -> None:
    """The score is (D − x)/σ² with D = c_skip x + c_out F(c_in x; c_noise), of a class and of none."""
    weights = saved(tmp_path / "network.pkl", kind, network, classes)
    score, sigma = load(tmp_path / "network.pkl"), torch.tensor([0.3, 5.0])
    labels = torch.tensor([1, CLASSES]) if classes else None
    s = sigma.double()
    if kind == "VPPrecond":  # σ² = e^B − 1, B = 9.95 t² + 0.1 t
        t = (-0.1 + torch.sqrt(0.01 + 4 * 9.95 * torch.log1p(s**2))) / (2 * 9.95)
        skip, out, scale, noise = torch.ones_like(s), -s, (s**2 + 1) ** -0.5, 999 * t
    elif kind == "VEPrecond":
        skip, out, scale, noise = torch.ones_like(s), s, torch.ones_like(s), torch.log(s / 2)
    else:
        total = s**2 + 0.25
        skip, out, scale, noise = 0.25 / total, 0.5 * s / total.sqrt(), total**-0.5, torch.log(s) / 4
    raw = unet(weights, expand(scale, X.double()) * X, noise, network, labels)
    denoised = expand(skip, X.double()) * X + expand(out, X.double()) * raw
    expected = (denoised - X) / expand(s, X.double()) ** 2
    with torch.no_grad():
        ours = score(X, score.sde.schedule.time(sigma), labels).double()
    for row, wanted in zip(ours, expected, strict=True):
        assert (row - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert score.images.centered and score.sample(1, num_steps=2).isfinite().all()
    assert (score.images.num_classes or 0) == classes


def test_iddpm(tmp_path: Path) -> None:
    """Of the levels u_j of its ladder the score is (D − x)/u² with D = x − u F(x/√(u² + 1); M − 1 − j), here of αx in
    the place of x; a second derivative is torch's own."""
    weights, levels = saved(tmp_path / "network.pkl", "iDDPMPrecond", "adm", CLASSES), 1000
    score, labels, j = load(tmp_path / "network.pkl"), torch.tensor([1, CLASSES]), torch.tensor([970, 200])
    cumulative = [np.sin(0.5 * np.pi * k / levels / 1.008) ** 2 for k in range(levels + 1)]
    u = torch.zeros(levels + 1, dtype=torch.float64)
    for k in range(levels, 0, -1):
        u[k - 1] = ((u[k] ** 2 + 1) / max(cumulative[k - 1] / cumulative[k], 0.001) - 1).sqrt()
    sigma = expand(u[j], X.double())
    noise = unet(weights, X, levels - 1 - j, "adm", labels)[:, :CHANNELS]
    x = X * (sigma**2 + 1).sqrt()
    expected = (x - sigma * noise - x) / sigma**2 * (sigma**2 + 1).sqrt()
    t = (levels - 1 - j) / (levels - 1)
    with torch.no_grad():
        ours = score(X, t, labels).double()
    for row, wanted in zip(ours, expected, strict=True):
        assert (row - wanted).abs().max() < 2e-5 * wanted.abs().max()
    asym = []
    for score.model.network.unet.own_derivatives in (True, False):
        torch.manual_seed(1)
        asym.append(score.asymmetry(X, t, probes=2, class_labels=labels))
    torch.testing.assert_close(*asym, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("EDMPrecond2", {}, "a EDMPrecond2 of a SongUNet; read are VPPrecond, VEPrecond, EDMPrecond, iDDPMPrecond"),
        ("EDMPrecond", {"class_name": "UViT"}, "a EDMPrecond of a UViT; read are .* of SongUNet and DhariwalUNet"),
        ("EDMPrecond", {"class_name": "DhariwalUNet"}, "its weights are not those of its network"),
        ("EDMPrecond", {"class_name": "DhariwalUNet", "channel_mult": [2]}, r"a DhariwalUNet of channel_mult=\[2\]"),
        ("EDMPrecond", {"decoder_type": "skip"}, "a SongUNet of decoder_type='skip'"),
        ("EDMPrecond", {"embedding_type": "rotary"}, "a SongUNet of embedding_type='rotary'"),
        ("EDMPrecond", {"resample_filter": [0, 0]}, r"a SongUNet of resample_filter=\[0, 0\]"),
        ("EDMPrecond", {"sigma_data": 0.0}, "a EDMPrecond of sigma_data=0: allowed are positive numbers"),
        ("EDMPrecond", {"num_blocks": 10**9}, "more than 100 blocks"),
        ("EDMPrecond", {"channel_mult": "abc"}, "no model of EDM's code: ValueError"),
        ("EDMPrecond", {"num_blocks": 2}, "its weights are not those of its network"),
        ("EDMPrecond", {"attn_resolutions": []}, "its weights are not those of its network: .* has no place in it"),
        ("EDMPrecond", {"model_channels": 16}, "made for another architecture"),
    ],
)
def test_networks_that_are_refused(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "network.pkl", kind, "ddpmpp", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "network.pkl")
    assert "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    """Whatever a pickle asks for is named, and not called."""
    saved(tmp_path / "network.pkl", "EDMPrecond", "ddpmpp")
    whole, trace = (tmp_path / "network.pkl").read_bytes(), tmp_path / "trace"
    storage = b"\x80\x04\x8c\rtorch.storage\x8c\x10_load_from_bytes\x93C" + bytes([len(p := pickle.dumps(Trap(trace)))])
    for content, message in (
        (pickle.dumps({"ema": Trap(trace)}), r"it asks for \w+\.mkdir"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (storage + p + b"\x85R.", "is not a pickle of plain data"),
        (b"\x80\x04]]\x85R.", "calls what it has made"),
        (whole[: len(whole) // 2], "is not a pickle of plain data"),
        (pickle.dumps({"ema": {}}), "no model of EDM's code"),
        (pickle.dumps([1]), "no model of EDM's code"),
        (b"", "is not a pickle of plain data"),
    ):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            load(tmp_path / "bad.pkl")
        assert "\n" not in str(error.value) and not trace.exists()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "missing.pkl")
    assert json.loads(load(tmp_path / "network.pkl").config.model.architecture)["constants"] == {"sigma_data": 0.5}
