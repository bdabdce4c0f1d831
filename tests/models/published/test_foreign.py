"""Models of other projects: their scores are the formulas applied to their networks, and their steps are ours."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers_models import DDPM_BLOCKS, LADDERS, NCSNPP_BLOCKS, X, needs_diffusers, saved_ddpm
from ml_collections import ConfigDict
from torch import Tensor, nn
from traps import Trap

from checkpoints import CheckpointError
from configs.defaults import base_config
from conservativeness import asymmetry
from exact.distributions import Gaussian
from likelihood import LikelihoodEvaluator
from models.published import read_published
from models.published.diffusers import PICKLED, WEIGHTS
from models.published.safetensors import read_safetensors, write_safetensors
from models.score import NoiseLevel, UnconstrainedScore
from run_lib import load
from sampling import AncestralPredictor, DPMSolverPlusPlus2M, ReverseDiffusionPredictor
from sde_lib import VE, VP, Flow, LadderBeta, LadderVP, LinearBeta, PolynomialSigma, StraightPath, expand

# ---------------------------------------------------------------------------------------------------------- diffusers


@needs_diffusers
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("squaredcos_cap_v2", "zero_terminal_snr") else pytest.mark.slow)
        for name in LADDERS
    ],
)
def test_ddpm_score_and_steps(name: str, tmp_path: Path) -> None:
    """The score is the formula of the prediction; an ancestral step is DDPM's and a DPM-Solver++ step of order one
    DDIM's, both with the library's own coefficients."""
    from diffusers import DDIMScheduler

    network, scheduler, levels = saved_ddpm(tmp_path, name)
    score = load(tmp_path)
    # In double precision: the library's own 1 − Π(1 − β) has lost four digits where there is little noise.
    # Of a ladder that ends with noise alone, all levels but that one.
    number, remaining = score.config.model.num_scales, torch.cumprod(1 - scheduler.betas.double(), 0)[levels]
    assert number == len(scheduler.betas) - (name == "zero_terminal_snr")
    alpha, sigma = (expand(c, X.double()) for c in (remaining.sqrt(), (1 - remaining).sqrt()))
    with torch.no_grad():
        h, ours = network(X, levels).sample.double(), score(X, levels / (number - 1)).double()
    expected = {
        "epsilon": -h / sigma,
        "sample": (alpha * h - X) / sigma**2,
        "v_prediction": -(alpha * h + sigma * X) / sigma,
    }[LADDERS[name][0]]
    assert ((ours - expected).abs().amax((1, 2, 3)) <= 1e-5 * expected.abs().amax((1, 2, 3)) + 1e-6).all()
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(len(scheduler.betas))
    ddim.set_timesteps(len(scheduler.betas))
    for level in (1, 7, number - 1):
        t, s = (torch.full((3,), k / (number - 1)) for k in (level, level - 1))
        with torch.no_grad():
            h = network(X, level).sample
            ancestral, _ = AncestralPredictor(score.sde, score).step(X, t, s, torch.Generator().manual_seed(5))
            flow, _ = DPMSolverPlusPlus2M(score.sde, score).step(X, t, s, None)
        theirs = scheduler.step(h, level, X, generator=torch.Generator().manual_seed(5)).prev_sample
        torch.testing.assert_close(ancestral, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flow, ddim.step(h, level, X, eta=0.0).prev_sample, rtol=1e-4, atol=1e-4)


@needs_diffusers
@pytest.mark.slow
def test_score_sde_ve(tmp_path: Path) -> None:
    """NCSN++ of the library divides by σ itself; its predictor's step is the one of reverse diffusion."""
    from diffusers import DiffusionPipeline, ScoreSdeVePipeline, ScoreSdeVeScheduler, UNet2DModel

    torch.manual_seed(1)
    network, scheduler = UNet2DModel(**NCSNPP_BLOCKS).eval(), ScoreSdeVeScheduler(50, sigma_max=30.0)
    assert issubclass(ScoreSdeVePipeline, DiffusionPipeline)
    ScoreSdeVePipeline(network, scheduler).save_pretrained(tmp_path)
    score, sigma, x = load(tmp_path), torch.tensor([0.01, 0.5, 30.0]), X.expand(-1, 3, -1, -1)
    assert (score.sde.name, score.images.centered, score.config.sampling.snr) == ("ve", False, 0.15)
    times = score.sde.schedule.time(sigma)
    with torch.no_grad():
        expected = network(x, sigma).sample
        torch.testing.assert_close(score(x, times), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    scheduler.set_sigmas(50, 0.01, 30.0)
    scheduler.set_timesteps(50)
    for level in (49, 20, 1):
        t, s = (torch.full((3,), k / 49) for k in (level, level - 1))
        with torch.no_grad():
            value = score(x, t)
            ours, _ = ReverseDiffusionPredictor(score.sde, score).step(x, t, s, torch.Generator().manual_seed(5))
        theirs = scheduler.step_pred(value, torch.tensor(level / 49 + 1e-6), x, torch.Generator().manual_seed(5))
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-4)


@needs_diffusers
@pytest.mark.slow
def test_forms_of_a_folder_and_what_can_be_asked(tmp_path: Path) -> None:
    """In one folder, or the network's own beside its scheduler's: the same model, which can do all that ours can."""
    network, scheduler, _ = saved_ddpm(tmp_path / "pipeline", "trained_betas")
    for writer in (network, scheduler):
        writer.save_pretrained(tmp_path / "flat")
    t = torch.full((3,), 0.4)
    first, flat, bare = (load(tmp_path / part) for part in ("pipeline", "flat", "pipeline/unet"))
    prefixed = load(f"diffusers:{tmp_path}/pipeline")
    for other in (flat, bare, prefixed):
        assert torch.equal(first(X, t), other(X, t))
    result = first.asymmetry(X, t, probes=2)
    assert (result.asym > 0).all() and result.nasym.isfinite().all()  # its attention is differentiated twice
    assert first.sample(2).shape == (2, 1, 8, 8)
    assert first.bits_per_dim(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).isfinite().all()


@needs_diffusers
def test_classes(tmp_path: Path) -> None:
    """Of a class the score is the formula; of none there is one only where the library's network has one class more."""
    network, _, levels = saved_ddpm(tmp_path, "trained_betas", num_class_embeds=3)
    labels, t = torch.tensor([2, 0, 1]), levels / 19
    score = load(tmp_path)
    assert (score.num_classes, score.images.num_classes) == (3, 3)
    with torch.no_grad():
        expected = -network(X, levels, labels).sample / expand(score.sde.std(t), X)
        torch.testing.assert_close(score(X, t, labels), expected, rtol=1e-5, atol=1e-5)
    assert score.sample(3, num_steps=2).isfinite().all()  # of the classes in turn
    for unconditional in (lambda: score(X, t), lambda: score.log_prob(X), lambda: score.asymmetry(X, t)):
        with pytest.raises(ValueError, match="has no unconditional score: it needs class labels"):
            unconditional()
    score = load(tmp_path, config=base_config({"training.label_dropout": 0.1}))
    with torch.no_grad():
        none = -network(X, levels, torch.full((3,), 2)).sample / expand(score.sde.std(t), X)
        torch.testing.assert_close(score(X, t), none, rtol=1e-5, atol=1e-5)
    assert score.num_classes == 2
    with pytest.raises(ValueError, match=r"model\.num_classes=2: data\.dataset='CIFAR10' has no classes"):
        score.take_levels_of(SimpleNamespace(shape=(1, 8, 8), num_levels=17, num_classes=None, name="own"))


@needs_diffusers
def test_weights_as_the_first_versions_of_the_library_wrote_them(tmp_path: Path) -> None:
    """A pickle, with other names for attention; it is read without running anything."""
    network, *_ = saved_ddpm(tmp_path, "trained_betas")
    folder, former = tmp_path / "unet", {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = read_safetensors(folder / WEIGHTS)
    for now, then in former.items():
        weights = {name.replace(f".{now}.", f".{then}."): tensor for name, tensor in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / PICKLED)
    score = load(tmp_path)
    assert all(
        torch.equal(tensor, score.model.network.unet.state_dict()[n]) for n, tensor in network.state_dict().items()
    )
    trace = tmp_path / "trace"
    for content, message in (
        ({"weight": Trap(trace)}, "it holds objects"),
        ({"weight": "none"}, "other things than weights"),
        ([torch.zeros(1)], "other things than weights"),
    ):
        torch.save(content, folder / PICKLED)
        with pytest.raises(CheckpointError, match=message) as error:
            load(tmp_path)
        assert "\n" not in str(error.value) and not trace.exists()


@needs_diffusers
@pytest.mark.parametrize("file", [WEIGHTS, PICKLED])
def test_names_on_the_hub(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All configs are fetched, then the weights of the network, in one form; of a network that is not read nothing."""
    hub, local, fetched = tmp_path / "owner" / "name", tmp_path / "local", []
    saved_ddpm(hub, "trained_betas")
    if file == PICKLED:
        torch.save(read_safetensors(hub / "unet" / WEIGHTS), hub / "unet" / PICKLED)
        (hub / "unet" / WEIGHTS).unlink()
    for other in ("text_encoder/model.safetensors", "unet/README.md", f"vae/{WEIGHTS}"):
        (hub / other).parent.mkdir(exist_ok=True)
        (hub / other).write_bytes(b"large")

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        for path in hub.rglob("*"):
            relative = str(path.relative_to(hub))
            if path.is_file() and any(fnmatch(relative, pattern) for pattern in allow_patterns):
                (local / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / relative)
                fetched.append(relative)
        return str(local)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    score, expected = load("diffusers:owner/name"), load(hub)
    assert torch.equal(score(X, t := torch.full((3,), 0.4)), expected(X, t))
    configs = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
    assert sorted(fetched) == sorted(configs | {f"unet/{file}"})
    fetched.clear()
    config = json.loads((hub / "unet" / "config.json").read_text())
    (hub / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(CheckpointError, match="a UNet2DConditionModel; read are UNet2DModel"):
        load("diffusers:owner/name")
    assert {*fetched} == configs


def test_latent_models_are_refused(tmp_path: Path) -> None:
    """Their networks look like those of images."""
    folder_of(tmp_path / "unet", {}, {})
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "unet"):
        with pytest.raises(CheckpointError, match="of what an autoencoder makes of images"):
            load(path)


def folder_of(path: Path, unet: dict, scheduler: dict | None = None) -> Path:
    """A folder with configs, and with weights that fit no network."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 8} | unet))
    if scheduler is not None:
        (path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"} | scheduler))
    write_safetensors(path / WEIGHTS, {"weight": torch.zeros(2)})
    return path


REFUSED = {
    "a UNet2DConditionModel; read are UNet2DModel": ({"_class_name": "UNet2DConditionModel"}, {}),
    "a EulerScheduler; read are DDPMScheduler": ({}, {"_class_name": "EulerScheduler"}),
    "no scheduler_config.json there": ({}, None),
    "beta_schedule='laplace': allowed are linear, scaled_linear": ({}, {"beta_schedule": "laplace"}),
    "prediction_type='flow': allowed are epsilon": ({}, {"prediction_type": "flow"}),
    "sample_size=None": ({"sample_size": None}, {}),
    "layers_per_block=1000000000": ({"layers_per_block": 10**9}, {}),
    "class_embed_type='identity'": ({"class_embed_type": "identity"}, {}),
    "num_class_embeds='ten'": ({"num_class_embeds": "ten"}, {}),
    "in_channels=6, out_channels=3: allowed are as many": ({"in_channels": 6}, {}),
    "num_train_timesteps=1000000000: at least 2": ({}, {"num_train_timesteps": 10**9}),
    "could not convert string to float": ({}, {"beta_start": "low"}),
    "cannot convert float infinity to integer": ({}, {"num_train_timesteps": float("inf")}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_folders_that_are_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(folder_of(tmp_path / "model", *REFUSED[message]))
    assert message in str(error.value) and "\n" not in str(error.value)


@needs_diffusers
@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (DDPM_BLOCKS, r"made for another architecture: network\.unet\.\S+ is missing"),
        (DDPM_BLOCKS | {"block_out_channels": (10**10, 10**10)}, "needs more memory than there is|GB of memory"),
        (DDPM_BLOCKS | {"down_block_types": ("os.system", "DownBlock2D")}, "cannot build it: os.system does not exist"),
        (DDPM_BLOCKS | {"sample_size": 7}, "cannot build it: Sizes of tensors must match"),
        ({"os.system": "echo"}, "cannot build it: .*unexpected keyword argument 'os.system'"),
    ],
    ids=["weights", "size", "block", "odd", "option"],
)
def test_networks_that_are_refused(unet: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(folder_of(tmp_path / "model", unet, {}))
    assert "\n" not in str(error.value)


def test_safetensors_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    whole = {"__metadata__": {}, "a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}
    text = json.dumps(whole).encode()
    for content in (
        struct.pack("<Q", 100 * 10**9) + b"{}",
        b"",
        struct.pack("<Q", len(text)) + text + bytes(100),
        struct.pack("<Q", 4) + b"\x80\x04N.",
        b"\x80\x04cos\nsystem\n(S'exit'\ntR.",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no safetensors file, or it is damaged") as error:
            read_safetensors(path)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no weights at"):
        read_safetensors(tmp_path / "nothing")


def test_weights_of_half_precision_and_shared_ones(tmp_path: Path) -> None:
    a = torch.arange(4.0)
    write_safetensors(tmp_path / "w", {"a": a, "half": a.half(), "transposed": a.view(2, 2).t(), "same": a})
    read = read_safetensors(tmp_path / "w")
    assert torch.equal(read["transposed"], a.view(2, 2).t()) and torch.equal(read["same"], a)
    assert read["half"].dtype == torch.float32 and torch.equal(read["half"], a)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install; a name that is no folder is not looked up without the prefix."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"need the library: pip install -r requirements-published\.txt"):
        load(folder_of(tmp_path / "model", DDPM_BLOCKS, {}))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load("owner/name")
    with pytest.raises(CheckpointError, match="no such folder, nor a name on the hub"):
        load(f"diffusers:{tmp_path}/missing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="not to be had from the hub") as error:
        load("diffusers:owner/name")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- Gaussian data, by every prediction

PROCESSES = {
    "ve": VE(PolynomialSigma(0.01, 60.0, 7.0)),
    "vp": VP(LinearBeta(0.1, 20.0)),
    "flow": Flow(StraightPath()),
    "ladder": LadderVP(LadderBeta(tuple(torch.linspace(1e-4, 0.05, 400, dtype=torch.float64).tolist()))),
}
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64)
FACTOR = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
COVARIANCE = 0.1 * torch.eye(4).double() + FACTOR @ FACTOR.T / 8


class Exact(nn.Module):
    """What a perfect network of Gaussian data predicts: from the conditional means of x_0 and ε given x_t = x."""

    def __init__(self, sde, prediction: str) -> None:
        super().__init__()
        self.sde, self.prediction = sde, prediction
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = self.times.pop() if self.times else label
        if self.prediction == "velocity_to_data":
            t = 1 - t
        alpha, sigma = self.sde.mean_coefficient(t)[:, None, None], self.sde.std(t)[:, None, None]
        noised = alpha**2 * COVARIANCE + sigma**2 * torch.eye(4).double()
        rest = torch.linalg.solve(noised, (x - alpha[..., 0] * MEAN)[..., None])
        x0, noise = MEAN + (alpha * COVARIANCE @ rest)[..., 0], (sigma * rest)[..., 0]
        alpha, sigma = alpha[..., 0], sigma[..., 0]
        return {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
            "velocity": noise - x0,
            "velocity_to_data": x0 - noise,
        }[self.prediction]


class TimeLabel(NoiseLevel):
    """The label is the time."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t if self.backwards else t, self.sde.std(t)


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        *(("vp", p) for p in ("epsilon", "sample", "v_prediction")),
        ("ve", "sample"),  # EDM's D
        *(("flow", p) for p in ("velocity", "velocity_to_data", "epsilon")),
        ("ladder", "v_prediction"),
    ],
)
def test_gaussian_data(process: str, prediction: str) -> None:
    """With exact predictions the score, the likelihood and NAsym are those of the closed form."""
    sde = PROCESSES[process]
    model = UnconstrainedScore(
        Exact(sde, prediction),
        TimeLabel(sde, backwards=prediction == "velocity_to_data"),
        prediction=prediction,
    )
    gaussian = Gaussian(sde, MEAN, COVARIANCE)
    x = gaussian.sample(3, torch.Generator().manual_seed(4))
    t = torch.linspace(0.05, 0.95, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, t), gaussian.score(x, t), rtol=1e-9, atol=1e-9)
    assert asymmetry(model, x, t).nasym.max() < 1e-20
    evaluator = LikelihoodEvaluator(sde, divergence="exact", time="log_ratio", solver="adams", num_steps=40, eps=1e-5)
    start = torch.full((3,), 1e-5, dtype=torch.float64)
    exact = gaussian.log_prob(x, start)
    # The prior is not quite the law at the end.
    end = torch.full((3,), sde.end_time, dtype=torch.float64)
    log_prob, latent, _ = evaluator(model, x)
    exact = exact + sde.prior_log_prob(latent) - gaussian.log_prob(latent, end)
    torch.testing.assert_close(log_prob, exact, rtol=5e-4, atol=5e-4)


# -------------------------------------------------------------------------------------------------- by an import path


def velocity_of_noise(x: Tensor, t: Tensor) -> Tensor:
    """Of data that is 0: x_t = t z, so that u = z = x/t."""
    return x / expand(t, x)


class Fixed(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(1, 1, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return super().forward(x) + expand(label, x)


def config_of(**fields: object) -> ConfigDict:
    config = base_config({"data.image_size": 4, "data.num_channels": 1, "model.scale_by_sigma": False})
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_networks_by_import_path() -> None:
    score = load(f"{__name__}:velocity_of_noise", config=config_of(training__sde="flow", data__centered=True))
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(score(x, t), -x / expand(t, x) ** 2, rtol=1e-5, atol=1e-5)
    assert score.asymmetry(x, t).nasym.max() < 1e-12
    fields = dict(training__sde="vpsde", model__prediction="sample")
    score = load(f"{__name__}:Fixed", config=config_of(**fields))
    h = score.model.network(x, 999 * t)
    alpha, sigma = expand(score.sde.mean_coefficient(t), x), expand(score.sde.std(t), x)
    torch.testing.assert_close(score(x, t), (alpha * h - x) / sigma**2, rtol=1e-5, atol=1e-5)
    assert score.shape == (1, 4, 4) and score.sample(1, method="few_step", solver="heun", num_steps=3).shape == (
        1,
        1,
        4,
        4,
    )
    for path, message in (
        ("nowhere:u", "No module named"),
        (f"{__name__}:Exact", "give the name of one that has been"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, config=config_of(**fields))
    assert read_published("nothing", None) is None
