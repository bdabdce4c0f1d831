"""The public codes themselves against ours: training step, likelihood and samples of one network with the same weights.

python -m benchmarks.peers [--qcsbm=FOLDER/real_world] [--score_sde=FOLDER] [--rounds=5] [--threads=1]

Clone them first: github.com/chen-hao-chao/qcsbm and github.com/yang-song/score_sde_pytorch. Their code runs as it is;
extensions of CUDA and TensorFlow, which have no part in what is timed on a CPU, are replaced in memory. The network and
the batch are those of ``benchmarks.training_step``; that it is the same function in both codes is checked first.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from ml_collections import ConfigDict

import run_lib
from benchmarks.measure import conditions, in_turn
from benchmarks.training_step import IMAGES, QC, SIZE, C, make_trainer, take
from configs.defaults import base_config
from experiment.command_line import command
from experiment.results import markdown_table
from experiment.runtime import Runtime
from models import ScoreModel
from models.published import convert_public_checkpoint

AGREEMENT = 1e-4
"""Of the two scores, relative to the larger: float32 sums in another order."""
STEPS = {"U": {}, "C": C, "QC, K = 1": QC}
HEADER = ("code", "what", "theirs, ms", "ours, ms", "theirs / ours", "scores differ by")


def run(
    *,
    qcsbm: str = "",
    score_sde: str = "",
    rounds: int = 5,
    pc_steps: int = 1000,
    what: tuple[str, ...] = ("train", "likelihood", "sample"),
    threads: int = 1,
    device: str = "cpu",
) -> str:
    """Time both codes in turn, in one process.

    Args:
        qcsbm: the folder ``real_world`` of the public QCSBM.
        score_sde: the folder of score_sde_pytorch.
        rounds: of training steps; medians are printed. Likelihood and samples are done once.
        pc_steps: of the predictor–corrector sampler, of Langevin and reverse diffusion.
        what: train, likelihood, sample.
        threads: of the CPU.
        device: auto, cpu or cuda.
    """
    folders = {"qcsbm": qcsbm, "score_sde_pytorch": score_sde}
    if not any(folders.values()):
        raise ValueError("--qcsbm, --score_sde: give at least one folder into which the code was cloned")
    if unknown := set(what) - {"train", "likelihood", "sample"}:
        raise ValueError(f"--what={min(unknown)}: allowed are train, likelihood, sample")
    for name, folder in folders.items():
        if folder and not (Path(folder) / "models" / "ncsnpp.py").is_file():
            flag = name.removesuffix("_pytorch")
            raise ValueError(f"--{flag}={folder}: is not {name}: it has no models/ncsnpp.py")
    torch.set_num_threads(threads)
    runtime, rows = Runtime(device), []
    for name, folder in folders.items():
        if folder:
            peer = Peer(Path(folder), runtime)
            rows += [(name, *row) for row in peer.compare(what, rounds, pc_steps)]
    return f"{conditions(runtime.torch_device)}\n{markdown_table(HEADER, rows)}"


class Peer:
    """A public code and ours, with one network between them."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.runtime, self.device = runtime, runtime.torch_device
        with imported_from(folder):
            self.losses, self.sde_lib, self.sampling, self.likelihood = map(
                importlib.import_module, ("losses", "sde_lib", "sampling", "likelihood")
            )
            self.model_utils, self.ema = map(importlib.import_module, ("models.utils", "models.ema"))
            importlib.import_module("models.ncsnpp")
            self.defaults = importlib.import_module("configs.default_cifar10_configs").get_default_configs
        # Only QCSBM's code has C and the QC term.
        self.names = list(STEPS) if "balancing_fac" in self.losses.get_step_fn.__code__.co_varnames else ["U"]
        self.x0 = torch.rand(SIZE["training.batch_size"], *IMAGES.shape, generator=torch.Generator().manual_seed(0))
        self.x0 = self.x0.to(self.device)

    def config(self) -> ConfigDict:
        """Theirs, of the network that is timed."""
        config, ours = self.defaults(), base_config(SIZE)
        with config.unlocked():
            config.device = self.device
            public = dict(name="ncsnpp", normalization="GroupNorm", attention_type="ddpm", conv_size=3)
            config.model = ConfigDict(config.model.to_dict() | ours.model.to_dict() | public)
        return config

    def sde(self, num_scales: int = 1000):
        model = base_config().model
        return self.sde_lib.VESDE(sigma_min=model.sigma_min, sigma_max=model.sigma_max, N=num_scales)

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.model_utils.create_model(self.config())

    def compare(self, what: tuple[str, ...], rounds: int, pc_steps: int) -> list[tuple[str, ...]]:
        works: dict[str, tuple[Callable, Callable]] = {}
        differ = f"{self.difference():.1e}"
        if "train" in what:
            works |= {f"training step, {name}": (self.step(name), self.our_step(name)) for name in self.names}
        if "likelihood" in what:
            works["likelihood, an image"] = self.likelihoods()
        if "sample" in what:
            works[f"PC, {pc_steps} steps, an image"] = self.samples(pc_steps)
        rows = []
        for name, (theirs, ours) in works.items():
            step = name.startswith("training")
            timed = in_turn(
                {"theirs": theirs, "ours": ours}, rounds if step else 1, self.device, warm_up=1 if step else 0
            )
            times = [1e3 * timed[who].median / (1 if step else len(self.x0)) for who in ("theirs", "ours")]
            rows.append((name, *(f"{time:.0f}" for time in times), f"{times[0] / times[1]:.2f}", differ))
        return rows

    def our_model(self, theirs: torch.nn.Module) -> ScoreModel:
        """Ours with the same weights."""
        config = base_config(SIZE)
        ours = run_lib.build_score_model(config, run_lib.build_sde(config), IMAGES).to(self.device)
        average = self.ema.ExponentialMovingAverage(theirs.parameters(), 0.999)
        state = {"model": theirs.state_dict(), "ema": average.state_dict(), "step": 0, "optimizer": None}
        ours.load_state_dict(convert_public_checkpoint(state, "the public code's network", ours, None)["model"])
        return ours.eval().requires_grad_(False)

    def difference(self) -> float:
        """Of the two scores at noised data of several levels."""
        theirs = self.model()
        for parameter in theirs.parameters():  # the last layers of blocks are zero at first
            parameter.data += 0.02 * torch.randn_like(parameter)
        score, ours, sde = self.score(theirs), self.our_model(theirs), self.sde()
        t = torch.linspace(0.1, 1, len(self.x0), device=self.device)
        mean, std = sde.marginal_prob(self.x0, t)
        x = mean + std[:, None, None, None] * torch.randn_like(mean)
        with torch.no_grad():
            found, expected = ours(x, t), score(x, t)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if difference > AGREEMENT:
            raise ValueError(f"the two scores differ by {difference:.1e} of the larger: they are not of one network")
        return difference

    def score(self, model: torch.nn.Module):
        return self.model_utils.get_score_fn(self.sde(), model, train=False, continuous=True)

    def step(self, name: str) -> Callable:
        config, model = self.config(), self.model()
        options = {"reduce_mean": False, "continuous": True, "likelihood_weighting": False}
        if len(self.names) > 1:
            weight = STEPS[name].get("training.qc_weight", 0.0)
            options |= {"balancing_fac": weight, "slices": 1, "energy": name == "C"}
        optimize = self.losses.optimization_manager(config)
        step = self.losses.get_step_fn(self.sde(), train=True, optimize_fn=optimize, **options)
        state = {
            "model": model,
            "optimizer": self.losses.get_optimizer(config, model.parameters()),
            "ema": self.ema.ExponentialMovingAverage(model.parameters(), decay=0.999),
            "step": 1,
        }
        return lambda _: step(state, self.x0) and None

    def our_step(self, name: str) -> Callable:
        return partial(take, make_trainer(name, SIZE | STEPS[name], self.runtime), 1)

    def likelihoods(self) -> tuple[Callable, Callable]:
        theirs = self.model()
        ours, config = self.our_model(theirs), base_config(SIZE)
        log_prob = self.likelihood.get_likelihood_fn(self.sde(), lambda x: x)
        score = run_lib.TrainedScore(config, ours, IMAGES, 0)
        return lambda _: log_prob(theirs, self.x0) and None, lambda _: score.log_prob(self.x0) is None

    def samples(self, steps: int) -> tuple[Callable, Callable]:
        theirs = self.model()
        ours, config = self.our_model(theirs), base_config(SIZE | {"sampling.num_steps": steps})
        with config.unlocked():
            config.model.num_scales = steps
        draw = self.sampling.get_pc_sampler(
            self.sde(steps),
            tuple(self.x0.shape),
            self.sampling.ReverseDiffusionPredictor,
            self.sampling.LangevinCorrector,
            lambda x: x,
            config.sampling.snr,
            continuous=True,
            eps=1e-5,
            device=self.device,
        )
        score = run_lib.TrainedScore(config, ours, IMAGES, 0)
        return lambda _: draw(theirs) and None, lambda _: score.sample(len(self.x0)) is None


@contextlib.contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """Imports take the modules of a folder, not ours of the same names, and neither extensions nor TensorFlow."""
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}

    def remove() -> Mapping[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}

    ours, here = remove(), Path(__file__).resolve().parents[1]
    path = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    no_extension = mock.patch("torch.utils.cpp_extension.load", lambda *_, **__: None)
    elsewhere = mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("tensorflow", "jax")})
    try:
        with no_extension, elsewhere, mock.patch.object(sys, "path", path):
            yield
    finally:
        remove()
        sys.modules.update(ours)


if __name__ == "__main__":
    command(run)
