"""Going on from a public checkpoint is going on from the same state in our own format, bit for bit."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from from_config import create_network, create_score_model, get_sde
from public_checkpoints import load_score_sde_checkpoint, read_public
from reference_networks import ddpm_shapes, random_state, refinenet_shapes
from test_run_lib import CPU, assert_identical, weights
from test_run_lib import tiny_config as digits_config
from torch import Tensor, nn

import run_lib
from checkpoints import CheckpointError, read_checkpoint
from models import NoiseLevel
from models.published import PublicCheckpoint, convert_public_checkpoint, official_names
from sde_lib import make_sde

tiny_config = partial(digits_config, model__parameterization="unconstrained")  # as public networks are

DATA = Path(__file__).parent / "models" / "published"
# How a residual block of NCSN++ constructs its parts.
PARTS = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2", "Conv2d_0")
PARTS += ("NIN_0", "NIN_1", "NIN_2", "NIN_3")


def construction_order(name: str) -> tuple[int, int, bool]:
    """Where score_sde_pytorch's U-Net has a parameter."""
    _, number, *part, leaf = name.split(".")
    return int(number), PARTS.index(part[0]) if part else -1, leaf in ("bias", "b")


def public_layout(tensor: Tensor, name: str) -> Tensor:
    return tensor[:, :, 0, 0].t() if ".NIN_" in name and name.endswith(".W") else tensor


def to_public(state: dict, network: nn.Module) -> dict:
    """One of our checkpoints as score_sde_pytorch would have written it, whose Adam is given every parameter: the fixed
    Fourier frequencies, which are the first, take the index 0 but have no state."""
    own = {official: name for name, official in official_names(network).items()}
    order = sorted(own, key=construction_order)
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    model = {"module.sigmas": torch.from_numpy(np.geomspace(10, 0.01, 1000))}
    shadow_params, moments = [], {}
    for index, official in enumerate(order):
        name = own[official]
        model[f"module.{official}"] = public_layout(state["model"][f"network.{name}"], official).contiguous()
        if name in trainable:
            shadow_params.append(public_layout(state["ema"]["model"][f"network.{name}"], official).contiguous())
            adam = state["optimizer"]["state"][trainable.index(name)]
            moments[index] = {"step": int(adam["step"])}
            for field in ("exp_avg", "exp_avg_sq"):
                moments[index][field] = public_layout(adam[field], official).contiguous()
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {
        "optimizer": {"state": moments, "param_groups": [group | {"params": list(range(len(order)))}]},
        "model": model,
        "ema": {"decay": 0.999, "num_updates": state["ema"]["num_updates"], "shadow_params": shadow_params},
        "step": state["step"],
    }


@pytest.fixture(scope="module")
def u_run(tmp_path_factory) -> tuple[Path, dict]:
    """A U run's checkpoint of step 6, and the same in the public format."""
    workdir = tmp_path_factory.mktemp("u")
    run_lib.train(tiny_config(training__n_iters=6), workdir, CPU)
    path = workdir / "checkpoints" / "step_00000006.pt"
    public = to_public(read_checkpoint(path), create_network(tiny_config()))
    assert 0 not in public["optimizer"]["state"] and len(public["optimizer"]["state"]) > 50
    return path, public


def test_going_on_from_a_public_checkpoint(u_run, tmp_path):
    own, public = u_run
    torch.save(public, tmp_path / "checkpoint_6.pth")
    for name, start in (("own", own), ("public", tmp_path / "checkpoint_6.pth")):
        run_lib.train(tiny_config(training__init_from=str(start)), tmp_path / name, CPU)
    assert_identical(weights(tmp_path / "own", 12), weights(tmp_path / "public", 12))
    states = [read_checkpoint(tmp_path / name / "checkpoints" / "step_00000012.pt") for name in ("own", "public")]
    assert [state["ema"]["num_updates"] for state in states] == [12, 12]


def test_qcsbm_saves_no_step(u_run, tmp_path):
    """The paper's own checkpoints lack it; the number of updates of the moving average is it."""
    own, public = u_run
    torch.save({key: value for key, value in public.items() if key != "step"}, tmp_path / "checkpoint.pth")
    assert read_public(tmp_path / "checkpoint.pth").step == 6
    for name, start in (("own", own), ("public", tmp_path / "checkpoint.pth")):
        run_lib.train(tiny_config("qc", training__init_from=str(start), training__n_iters=8), tmp_path / name, CPU)
    assert_identical(weights(tmp_path / "own", 8), weights(tmp_path / "public", 8))


@pytest.mark.parametrize("optimizer", [{}, {"state": {}, "param_groups": []}, None])
def test_without_an_optimiser_state_the_moments_start_from_zero(optimizer, u_run, tmp_path, caplog):
    _, public = u_run
    stripped = {key: value for key, value in public.items() if key != "optimizer"}
    torch.save(stripped if optimizer is None else stripped | {"optimizer": optimizer}, tmp_path / "stripped.pth")
    start = str(tmp_path / "stripped.pth")
    run_lib.train(tiny_config(training__init_from=start, training__n_iters=8), tmp_path / "w", CPU)
    assert "stripped.pth has no optimiser state: Adam's moments start from zero" in caplog.text
    state = read_checkpoint(tmp_path / "w" / "checkpoints" / "step_00000008.pt")
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {2}
    assert state["ema"]["num_updates"] == 8


def broken(public: dict, how: str) -> dict:
    optimizer = {"state": dict(public["optimizer"]["state"]), "param_groups": public["optimizer"]["param_groups"]}
    public = {**public, "optimizer": optimizer}
    if how == "one parameter short":
        optimizer["param_groups"] = [{**optimizer["param_groups"][0], "params": list(range(1, 60))}]
    elif how == "amsgrad":
        optimizer["state"][1] = optimizer["state"][1] | {"max_exp_avg_sq": optimizer["state"][1]["exp_avg_sq"]}
    elif how == "no state":
        del optimizer["state"][1]
    elif how == "another shape":
        optimizer["state"][1] = optimizer["state"][1] | {"exp_avg": torch.zeros(3)}
    elif how == "an average short":
        public["ema"] = public["ema"] | {"shadow_params": public["ema"]["shadow_params"][1:]}
    elif how == "another noise":
        public["model"] = public["model"] | {"module.sigmas": torch.from_numpy(np.geomspace(50, 0.01, 1000))}
    elif how == "another network":
        public["model"] = {name: t for name, t in public["model"].items() if not name.endswith("all_modules.1.bias")}
        public["ema"] = public["ema"] | {"shadow_params": public["ema"]["shadow_params"][:1]}
    return public


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one parameter short", r"public\.pth: its optimiser has 59 parameters, its model \d+$"),
        ("amsgrad", r"optimiser state of all_modules\.1\.weight is exp_avg, exp_avg_sq, max_exp_avg_sq, step; read is"),
        ("no state", r"optimiser state of all_modules\.1\.weight is nothing"),
        ("another shape", r"exp_avg of all_modules\.1\.weight has shape \(3,\) instead of \(32, 16\)"),
        ("an average short", r"has \d+ averages for \d+ trainable parameters"),
        ("another noise", r"model\.sigma_min=0\.01, model\.sigma_max=10, .*public\.pth .* 1000 other .* 0\.01 to 50"),
        ("another network", r"another architecture: time_mlp\.0\.bias is missing$"),
        ("too far", r"training\.n_iters=6: training\.init_from=.* has done 6 steps already"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(how, message, u_run, tmp_path):
    torch.save(broken(u_run[1], how), tmp_path / "public.pth")
    n_iters = 6 if how == "too far" else 12
    config = tiny_config(training__init_from=str(tmp_path / "public.pth"), training__n_iters=n_iters)
    with pytest.raises(run_lib.InvalidRun, match=message) as error:
        run_lib.train(config, tmp_path / "w", CPU)
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_noise_levels_are_compared_in_evaluation_too(u_run, tmp_path):
    torch.save(broken(u_run[1], "another noise"), tmp_path / "public.pth")
    with pytest.raises(run_lib.InvalidRun, match=r"model\.sigma_max=10, .* 1000 other noise levels, from 0\.01 to 50$"):
        run_lib.sample(tiny_config(), tmp_path / "w", CPU, tmp_path / "public.pth")


def test_the_newest_of_a_public_folder(u_run, tmp_path):
    """It is the one of the highest number; ours come first."""
    own, public = u_run
    (tmp_path / "checkpoints").mkdir()
    for number in (2, 10):
        torch.save(public | {"step": number}, tmp_path / "checkpoints" / f"checkpoint_{number}.pth")
    (tmp_path / "checkpoints" / "checkpoint_old.pth").touch()
    assert run_lib.load(tmp_path, config=tiny_config()).step == 10
    (tmp_path / "checkpoints" / own.name).write_bytes(own.read_bytes())
    assert run_lib.load(tmp_path).step == 6


# ------------------------------------------------------------------------------------------------ noise levels, damage


def with_table(table: Tensor) -> PublicCheckpoint:
    ema = {"num_updates": 1, "shadow_params": []}
    return PublicCheckpoint({"model": {"module.sigmas": table}, "ema": ema}, "public.pth")


def noise_level(family: str = "vesde", schedule: str = "", num_scales: int | None = None) -> NoiseLevel:
    constants = dict(sigma_min=0.01, sigma_max=50.0, beta_min=0.1, beta_max=20.0, rho=2.0)
    return NoiseLevel(make_sde(family, schedule, constants), num_scales)


def test_all_noise_levels_are_compared():
    """Of models of continuous time their number is only that of the sampler's steps; of VP only the number counts."""
    table = torch.from_numpy(np.geomspace(50, 0.01, 1000))
    checkpoint = with_table(table)
    for given in (noise_level(), noise_level(num_scales=1000), noise_level("vpsde"), noise_level("subvpsde")):
        checkpoint.check_noise_levels(given)
    with_table(table.float()).check_noise_levels(noise_level("vpsde", num_scales=1000))
    for family in ("vesde", "vpsde"):
        with pytest.raises(CheckpointError, match=r"^model\.num_scales=500: .* with 1000 noise levels"):
            checkpoint.check_noise_levels(noise_level(family, num_scales=500))
    with pytest.raises(CheckpointError, match=r"model\.schedule: public\.pth .* other noise levels, from 0\.01 to 50$"):
        checkpoint.check_noise_levels(noise_level(schedule="polynomial"))
    changed = table.clone()
    changed[500] *= 1.001
    with pytest.raises(CheckpointError, match=r"model\.schedule: public\.pth .* 1000 other noise levels"):
        with_table(changed).check_noise_levels(noise_level(num_scales=1000))
    for damaged in (table[:1], table[:, None], torch.arange(5)):
        with pytest.raises(CheckpointError, match=r"public\.pth: its sigmas are no list of noise levels"):
            with_table(damaged).check_noise_levels(noise_level())


OF_ONE = {"param_groups": [{"params": [0]}]}
NOT_OF_TORCH = "the optimiser state is not in torch's form"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=[1]), "missing, or of another form: model"),
        (dict(ema=5), "missing, or of another form: ema.shadow_params, ema.num_updates"),
        (dict(ema={"shadow_params": []}), "another form: ema.num_updates, step"),
        (dict(ema={"shadow_params": "0", "num_updates": 1}), "another form: ema.shadow_params"),
        (dict(ema={"shadow_params": [], "num_updates": torch.ones(2)}), "another form: ema.num_updates"),
        (dict(step="7"), "another form: step"),
        (dict(optimizer=[1]), "another form: optimizer"),
        (dict(optimizer=torch.ones(2)), "another form: optimizer"),
        (dict(optimizer={"state": torch.ones(2), **OF_ONE}), NOT_OF_TORCH),
        (dict(model={"module.a": "0"}), "module.a is a str instead of a tensor"),
        (dict(model={7: torch.eye(2).to_sparse()}), "7 is a tensor without plain numbers"),
        (dict(ema={"shadow_params": [None], "num_updates": 1}), "an average is a NoneType instead of a tensor"),
        (dict(optimizer={"state": {0: 1}}), NOT_OF_TORCH),
        (dict(optimizer={"state": [1], **OF_ONE}), NOT_OF_TORCH),
        (dict(optimizer={"state": {0: 1}, **OF_ONE}), NOT_OF_TORCH),
        (dict(optimizer={"state": {0: {"step": torch.ones(2)}}, **OF_ONE}), NOT_OF_TORCH),
        (
            dict(optimizer={"state": {0: {"step": 1, "exp_avg": "0", "exp_avg_sq": torch.zeros(2)}}, **OF_ONE}),
            "exp_avg of a is a str instead of a tensor",
        ),
    ],
)
def test_malformed_public_checkpoints_are_named(change, message):
    ema = {"num_updates": 1, "shadow_params": [torch.zeros(2)]}
    state = {"model": {"module.a": torch.zeros(2)}, "ema": ema, "step": 1, "optimizer": {}} | change
    if "step" not in change:
        del state["step"]
    with pytest.raises(CheckpointError) as error:
        PublicCheckpoint(state, "public.pth").optimizer_state(create_network(SHAPES["ve.ncsnv2.cifar10"][0]))
    assert str(error.value).startswith("public.pth") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, weight: (f"module._orig_mod.{name[7:]}", weight), "whose names begin with '_orig_mod.'"),
        (lambda name, weight: (name, weight.half()), r"another precision: \S+ is float16 instead of float32"),
    ],
)
def test_public_weights_of_another_form_are_named(change, message, u_run, tmp_path):
    model = dict(change(name, weight) for name, weight in u_run[1]["model"].items())
    torch.save(u_run[1] | {"model": model}, tmp_path / "public.pth")
    with pytest.raises(CheckpointError, match=message):
        run_lib.load(tmp_path / "public.pth", config=tiny_config())


# ---------------------------------------------------------------------------------------------------- the moments alone


def reduced(path: str, **fields):
    config = importlib.import_module(f"configs.{path}").get_config()
    config.model.update(fields)
    return config


SHAPES = {
    "ve.cifar10_ncsnpp_continuous": (reduced("ve.cifar10_ncsnpp_continuous", nf=8, num_res_blocks=1), None),
    "vp.cifar10_ddpmpp_continuous": (reduced("vp.cifar10_ddpmpp_continuous", nf=8, num_res_blocks=1), None),
    "vp.ddpm.cifar10": (reduced("vp.ddpm.cifar10", nf=8), ddpm_shapes(8, (1, 2, 2, 2), 2, (1,))),
    "ve.ncsn.cifar10": (reduced("ve.ncsn.cifar10", nf=4), refinenet_shapes(64, 4, 10)),
    "ve.ncsnv2.cifar10": (reduced("ve.ncsnv2.cifar10", nf=4), refinenet_shapes(64, 4)),
}


@pytest.mark.parametrize("old_keys", [False, True], ids=["index", "id"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_moment_finds_its_parameter(name, old_keys, tmp_path):
    """Distinct random moments; old versions of torch key them by addresses instead of 0, 1, …"""
    config, shapes = SHAPES[name]
    if shapes is None:
        golden = "ve_ncsnpp_cifar10" if "ncsnpp" in name else "vp_ddpmpp_cifar10"
        model = read_checkpoint(DATA / f"{golden}.pth")["model"]
        shapes = {key.removeprefix("module."): tuple(t.shape) for key, t in model.items() if key != "module.sigmas"}
    frozen = [key for key in shapes if key == "all_modules.0.W"]
    state = random_state(shapes)
    first, second = random_state(shapes, seed=1), random_state(shapes, seed=2)
    keys = [140_000_000_000 + 80 * i if old_keys else i for i in range(len(shapes))]
    adam = {
        key: {"step": 123, "exp_avg": first[parameter], "exp_avg_sq": second[parameter]}
        for key, parameter in zip(keys, shapes, strict=True)
        if parameter not in frozen
    }
    checkpoint = {
        "model": {f"module.{parameter}": tensor for parameter, tensor in state.items()},
        "ema": {"num_updates": 123, "shadow_params": [t for parameter, t in state.items() if parameter not in frozen]},
        "optimizer": {"state": adam, "param_groups": [{"params": keys}]},
        "step": 123,
    }
    torch.save(checkpoint, tmp_path / "public.pth")
    score_model = create_score_model(config, get_sde(config))
    parameters = [p for p in score_model.parameters() if p.requires_grad]
    path = tmp_path / "public.pth"
    converted = convert_public_checkpoint(read_checkpoint(path), path, score_model, torch.optim.Adam(parameters))
    names = official_names(score_model.network)
    trainable = [parameter for parameter, p in score_model.network.named_parameters() if p.requires_grad]
    assert len(converted["optimizer"]["state"]) == len(trainable) == len(shapes) - len(frozen)
    assert bool(frozen) == ("ncsnpp" in name)
    for index, own in enumerate(trainable):
        moments, official = converted["optimizer"]["state"][index], names[own]
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameters[index].shape
        assert torch.equal(public_layout(moments["exp_avg"], official), first[official]), own
        assert torch.equal(public_layout(moments["exp_avg_sq"], official), second[official]), own
        assert moments["step"] == 123


# --------------------------------------------------------------------------------------- the lists of NCSN and NCSNv2


@pytest.mark.parametrize("kind", ["ncsn", "ncsnv2", "ncsnv2 without average"])
def test_lists_of_the_codes_of_ncsn(kind, tmp_path):
    path = "ve.ncsn.cifar10" if kind == "ncsn" else "ve.ncsnv2.cifar10"
    config, shapes = SHAPES[path]
    state, averages, moments = (random_state(shapes, seed=seed) for seed in range(3))
    model = {f"module.{name}": tensor for name, tensor in state.items()}
    if kind != "ncsn":
        model = {"module.sigmas": torch.from_numpy(np.geomspace(50, 0.01, 232)).float()} | model
    adam = {i: {"step": 500, "exp_avg": m, "exp_avg_sq": m**2} for i, m in enumerate(moments.values())}
    values = [model, {"state": adam, "param_groups": [{"params": list(range(len(shapes)))}]}]
    if kind != "ncsn":
        values += [3, 500]  # epoch, step
    if kind == "ncsnv2":
        values.append(dict(reversed(averages.items())))  # by name, without the prefix
    else:
        averages = state
    torch.save(values, tmp_path / "checkpoint.pth")

    checkpoint, network = read_public(tmp_path / "checkpoint.pth"), create_network(config)
    assert (checkpoint.step, checkpoint.num_updates) == (500, 500)
    checkpoint.check_noise_levels(NoiseLevel(get_sde(config)))
    for ema, expected in ((False, state), (True, averages)):
        assert load_score_sde_checkpoint(tmp_path / "checkpoint.pth", network, ema=ema, sde=get_sde(config)) == 500
        parameters = dict(network.named_parameters())
        assert all(torch.equal(parameters[own], expected[name]) for own, name in official_names(network).items())
    states = checkpoint.optimizer_state(network)
    assert all(torch.equal(states[own]["exp_avg"], moments[name]) for own, name in official_names(network).items())


def test_other_lists_are_no_checkpoints(tmp_path):
    torch.save([{"a": torch.zeros(1)}], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list that is none of NCSN's checkpoints"):
        read_public(tmp_path / "list.pth")
