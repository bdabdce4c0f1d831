"""Every config loads under its name, states a command that works, builds, and has the facts of the public one."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from from_config import create_score_model, get_dataset, get_likelihood, get_objective, get_sampler, get_sde
from ml_collections import ConfigDict

from configs.checks import item_shape
from configs.presets import NCSNPP_FIELDS

ROOT = Path(__file__).parents[2]
SHARED = ("__init__.py", "checks.py", "defaults.py", "fields.py", "presets.py", "public.py", "ranges.py")
SHARED += ("stored.py",)
# Those of bridges have other fields: test_bridge_training.
FILES = sorted(
    p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.py") if p.name not in SHARED and p.parent.name != "dsb"
)
every_file = pytest.mark.parametrize("path", FILES, ids=str)

# score_sde_pytorch's configs by path, and what it writes there.
VE_256 = {"training.batch_size": 64, "model.num_scales": 2000, "model.dropout": 0.0, "sampling.snr": 0.075}
VE_256 |= {"model.ch_mult": (1, 1, 2, 2, 2, 2, 2), "model.num_res_blocks": 2, "model.nf": 128, "data.image_size": 256}
VE_256 |= {"model.progressive": "output_skip", "model.progressive_input": "input_skip", "training.n_iters": 2400001}
VE_256 |= {"model.ema_rate": 0.999, "sampling.predictor": "reverse_diffusion", "training.continuous": True}
VE_1024 = VE_256 | {"data.image_size": 1024, "model.nf": 16, "model.ch_mult": (1, 2, 4, 8, 16, 32, 32, 32)}
VE_1024 |= {"training.batch_size": 8, "model.sigma_max": 1348, "model.num_res_blocks": 1, "model.ema_rate": 0.9999}
VE_1024 |= {"sampling.snr": 0.15}
VE_32 = {"training.sde": "vesde", "model.sigma_max": 50, "model.ema_rate": 0.999, "sampling.snr": 0.16}
VE_32 |= {"sampling.predictor": "reverse_diffusion", "sampling.corrector": "langevin", "model.num_scales": 1000}
VE_32 |= {"training.reduce_mean": False, "data.centered": False, "model.fir": True, "model.num_res_blocks": 4}
VP_32 = {"training.sde": "vpsde", "training.reduce_mean": True, "data.centered": True, "model.ema_rate": 0.9999}
VP_32 |= {"model.embedding_type": "positional", "sampling.corrector": "none", "training.continuous": True}
VP_32 |= {"model.fir": False, "model.progressive_input": "none", "model.num_res_blocks": 4, "training.n_iters": 1300001}
VP_32 |= {"model.scale_by_sigma": False, "sampling.predictor": "euler_maruyama"}
DEEP = {"model.num_res_blocks": 8, "training.n_iters": 950001}
ON_NCSNPP = {"model.fir": True, "model.progressive_input": "residual"}
DISCRETE = {"training.continuous": False, "model.embedding_type": "positional"}
SUB_VP = {"training.sde": "subvpsde"}
DDPM = {"model.name": "ddpm", "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2, 2), "model.nf": 128}
VP_DDPM = {field: value for field, value in VP_32.items() if field.removeprefix("model.") not in NCSNPP_FIELDS} | DDPM
VP_DDPM_DISCRETE = VP_DDPM | {"training.continuous": False, "sampling.predictor": "ancestral_sampling"}
VP_DDPM_256 = VP_DDPM_DISCRETE | {"data.image_size": 256, "model.ch_mult": (1, 1, 2, 2, 4, 4), "model.dropout": 0.0}
VP_DDPM_256 |= {"training.n_iters": 2400001, "training.batch_size": 64, "model.num_scales": 1000, "optim.lr": 2e-5}
NCSN = {"model.name": "ncsn", "training.sde": "vesde", "training.continuous": False, "model.scale_by_sigma": False}
NCSN |= {"sampling.predictor": "none", "sampling.corrector": "ald", "model.nonlinearity": "elu", "model.nf": 128}
NCSN |= {"optim.lr": 1e-3, "optim.warmup": 0, "optim.grad_clip": -1.0, "model.ema_rate": 0.0, "data.image_size": 32}
NCSN |= {"model.sigma_max": 1, "model.num_scales": 10, "sampling.n_steps_each": 100, "sampling.snr": 0.316}
CELEBA = {"data.image_size": 64, "data.dataset": "CELEBA"}
AVERAGED = {"model.ema_rate": 0.999}
LEVELS_32 = {"model.sigma_max": 50, "model.num_scales": 232, "sampling.n_steps_each": 5, "sampling.snr": 0.176}
LEVELS_64 = {"model.sigma_max": 90, "model.num_scales": 500, "sampling.n_steps_each": 5, "sampling.snr": 0.128}
NCSNV2 = NCSN | AVERAGED | {"model.name": "ncsnv2_64", "model.scale_by_sigma": True, "optim.lr": 1e-4}
LEVELS_128 = {"model.sigma_max": 190, "model.num_scales": 1086, "sampling.n_steps_each": 3, "sampling.snr": 0.095}
LEVELS_128 |= {"model.name": "ncsnv2_128", "data.image_size": 128, "model.ema_rate": 0.9999, "training.batch_size": 128}
OFFICIAL: dict[str, dict] = {
    "ve/cifar10_ncsnpp": VE_32 | DISCRETE,
    "ve/cifar10_ncsnpp_continuous": VE_32 | {"model.embedding_type": "fourier", "training.continuous": True},
    "ve/cifar10_ncsnpp_deep_continuous": VE_32 | DEEP,
    "ve/celeba_ncsnpp": VE_32 | DISCRETE | {"model.sigma_max": 90, "sampling.snr": 0.17, "data.image_size": 64},
    "ve/bedroom_ncsnpp_continuous": VE_256 | {"model.sigma_max": 378},
    "ve/church_ncsnpp_continuous": VE_256 | {"model.sigma_max": 380},
    "ve/celebahq_256_ncsnpp_continuous": VE_256 | {"model.sigma_max": 348},
    "ve/ffhq_256_ncsnpp_continuous": VE_256 | {"model.sigma_max": 348},
    "ve/celebahq_ncsnpp_continuous": VE_1024 | {"training.reduce_mean": False},
    "ve/ffhq_ncsnpp_continuous": VE_1024 | {"training.reduce_mean": True},
    "ve/cifar10_ddpm": DDPM | {"training.sde": "vesde", "training.continuous": False, "model.scale_by_sigma": True},
    "ve/ncsn/cifar10": NCSN,
    "ve/ncsn/cifar10_5": NCSN | AVERAGED,
    "ve/ncsn/cifar10_124": NCSN | LEVELS_32,
    "ve/ncsn/cifar10_1245": NCSN | LEVELS_32 | AVERAGED,
    "ve/ncsn/celeba": NCSN | CELEBA,
    "ve/ncsn/celeba_5": NCSN | CELEBA | AVERAGED,
    "ve/ncsn/celeba_124": NCSN | CELEBA | LEVELS_64,
    "ve/ncsn/celeba_1245": NCSN | CELEBA | LEVELS_64 | AVERAGED,
    "ve/ncsnv2/cifar10": NCSNV2 | LEVELS_32,
    "ve/ncsnv2/celeba": NCSNV2 | CELEBA | LEVELS_64,
    "ve/ncsnv2/bedroom": NCSNV2 | LEVELS_128,
    "vp/ddpm/cifar10": VP_DDPM_DISCRETE,
    "vp/ddpm/cifar10_unconditional": VP_DDPM_DISCRETE | {"model.conditional": False},
    "vp/ddpm/cifar10_continuous": VP_DDPM,
    "vp/ddpm/bedroom": VP_DDPM_256,
    "vp/ddpm/church": VP_DDPM_256,
    "vp/ddpm/celebahq": VP_DDPM_256,
    "subvp/cifar10_ddpm_continuous": VP_DDPM | SUB_VP,
    "vp/cifar10_ddpmpp": VP_32 | DISCRETE | {"sampling.predictor": "ancestral_sampling"},
    "vp/cifar10_ddpmpp_continuous": VP_32,
    "vp/cifar10_ddpmpp_deep_continuous": VP_32 | DEEP,
    "vp/cifar10_ncsnpp": VP_32 | DISCRETE | ON_NCSNPP | {"sampling.predictor": "reverse_diffusion"},
    "vp/cifar10_ncsnpp_continuous": VP_32 | ON_NCSNPP,
    "vp/cifar10_ncsnpp_deep_continuous": VP_32 | DEEP | ON_NCSNPP,
    "subvp/cifar10_ddpmpp_continuous": VP_32 | SUB_VP,
    "subvp/cifar10_ddpmpp_deep_continuous": VP_32 | DEEP | SUB_VP,
    "subvp/cifar10_ncsnpp_continuous": VP_32 | ON_NCSNPP | SUB_VP,
    "subvp/cifar10_ncsnpp_deep_continuous": VP_32 | DEEP | ON_NCSNPP | SUB_VP,
}


def load(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.with_suffix("").parts))


def variants(module: ModuleType) -> dict[str, ConfigDict]:
    """The configs of a file by their argument, or one by the empty name."""
    if hasattr(module, "MODELS"):
        return {argument: module.get_config(argument) for argument in module.MODELS}
    return {"": module.get_config()}


CASES = {f"{path}:{name}": (path, name) for path in FILES for name in variants(load(path))}


def reduced(config: ConfigDict) -> ConfigDict:
    """As narrow as the network can be, on images as small as its levels allow, in batches of two."""
    config.model.nf = 4 if config.data.image_size > 256 else 8
    if "num_res_blocks" in config.model:
        config.model.num_res_blocks = 1
    if config.data.image_size > 64:
        config.data.image_size //= 4 if config.data.image_size <= 256 else 8
    config.training.qc_probes = min(config.training.qc_probes, 2)
    return config


@pytest.mark.parametrize(("path", "name"), CASES.values(), ids=CASES)
def test_every_config_builds_and_steps(path, name):
    """At reduced width every config gives a finite loss and gradient, and a sampler and likelihood."""
    config = reduced(variants(load(path))[name])
    sde = get_sde(config)
    objective = get_objective(config, create_score_model(config, sde))
    get_sampler(config, sde)
    get_likelihood(config, sde)
    x0 = torch.rand(max(2, config.training.qc_stride), *item_shape(config.data))
    labels = torch.tensor([0, config.model.num_classes]) if config.model.num_classes else None
    terms = objective(x0, class_labels=labels)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"]) and ("qc" in terms) == (config.training.qc_weight > 0)
    gradients = [p.grad for p in objective.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@every_file
def test_every_config_opens_with_its_launch_command(path):
    """At most 40 lines; the commands in the docstring name the file itself, its arguments and fields that it has."""
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 40
    docstring = ast.get_docstring(ast.parse(text))
    commands = [line for line in docstring.splitlines() if line.startswith("python main.py")]
    assert commands
    configs = variants(load(path))
    for command in commands:
        flags = dict(part.removeprefix("--").split("=", 1) for part in shlex.split(command)[2:])
        file, _, argument = flags.pop("config").partition(":")
        assert file == str(path) and {"workdir", "mode"} <= flags.keys()
        for flag in flags.keys() - {"workdir", "mode"}:
            # Fails for a field that does not exist.
            value: object = configs[argument]
            for field in flag.removeprefix("config.").split("."):
                value = value[field]


@pytest.mark.parametrize("name", OFFICIAL)
def test_facts_of_the_public_configs(name):
    flat = {}
    for section, fields in load(Path(f"configs/{name}.py")).get_config().to_dict().items():
        if isinstance(fields, dict):
            flat |= {f"{section}.{field}": value for field, value in fields.items()}
    expected = OFFICIAL[name]
    assert {field: flat[field] for field in expected} == expected


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match=r"config argument 'x': allowed are u, c, qc, qc_sampling"):
        load(Path("configs/qcsbm/svhn.py")).get_config("x")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet32", "svhn"])
def test_settings_of_section_5(name):
    """Chao et al. (2023): λ = 1e-4; 16 probes and 8 images, or 1 and 128; 700 000 steps of NCSN++ (deep)."""
    configs = variants(load(Path(f"configs/qcsbm/{name}.py")))
    assert list(configs) == ["u", "c", "qc", "qc_sampling"]
    for argument, (weight, probes, batch_size) in {
        "u": (0.0, 1, 128),
        "c": (0.0, 1, 128),
        "qc": (1e-4, 16, 8),
        "qc_sampling": (1e-4, 1, 128),
    }.items():
        config = configs[argument]
        training, model = config.training, config.model
        assert (training.qc_weight, training.qc_probes, training.batch_size) == (weight, probes, batch_size)
        assert (training.n_iters, model.num_res_blocks, model.dropout) == (700000, 8, 0.1)
        assert model.parameterization == ("conservative" if argument == "c" else "unconstrained")
        assert config.data.dataset.lower() == name
        # Their evaluation's: tolerances of the ODE sampler, number of samples, noise levels of Asym from 0.
        assert (config.sampling.rtol, config.sampling.atol) == (1e-4 if "qc" in argument else 5e-5, 1e-6)
        assert config.eval.num_samples == (26_032 if name == "svhn" else 50_000)
        assert (config.eval.asym_levels, config.eval.asym_first_level) == (100, 0)
    assert 600000 % configs["u"].training.snapshot_freq == 0  # the checkpoint that QC starts from is kept


@pytest.mark.parametrize("name", [name for name, facts in OFFICIAL.items() if facts.get("data.image_size", 32) > 64])
def test_sets_that_are_folders_say_what_to_give(name):
    config = load(Path(f"configs/{name}.py")).get_config()
    with pytest.raises(ValueError, match=r"^data\.path is not set; .* a folder of images"):
        get_dataset(config)


def test_every_official_config_is_listed():
    """Files of the three folders that are named like score_sde_pytorch's are compared with it above."""
    ours = {re.sub(r"^configs/|\.py$", "", str(p)) for p in FILES if p.parts[1] in ("ve", "vp", "subvp")}
    assert ours == set(OFFICIAL)
