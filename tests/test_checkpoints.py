"""Checkpoints survive crashes and damage."""

from __future__ import annotations

import copy
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import (
    CHECKPOINT_VERSION,
    CheckpointError,
    CheckpointStore,
    load_state_dict_strictly,
    read_checkpoint,
    write_checkpoint,
)
from experiment.files import write_atomically
from models import EMA
from training import fit


def whole(step: int, **parts: object) -> dict:
    """The least that is a checkpoint of a training run."""
    state = dict(version=CHECKPOINT_VERSION, step=step, model={}, ema=None, optimizer=None, scaler=None)
    return state | dict(sums={}, log_size=0, hooks_done=True, record={}) | parts


def test_missing_extra_and_misshapen_weights_are_named():
    module = torch.nn.Linear(2, 3)
    good = module.state_dict()
    load_state_dict_strictly(module, good, "here")
    with pytest.raises(CheckpointError, match=r"here .*bias is missing"):
        load_state_dict_strictly(module, {"weight": good["weight"]}, "here")
    with pytest.raises(CheckpointError, match="other is unexpected"):
        load_state_dict_strictly(module, {**good, "other": good["bias"]}, "here")
    with pytest.raises(CheckpointError, match=r"bias has shape \(2,\) instead of \(3,\)"):
        load_state_dict_strictly(module, {**good, "bias": torch.zeros(2)}, "here")


def test_keeps_the_newest_and_the_milestones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, milestone_every=100)
    for step in (50, 100, 150, 200, 250, 260):
        store.save(whole(step), step)
    assert store.steps() == [100, 200, 250, 260]
    assert store.load_latest()["step"] == 260
    assert CheckpointStore(tmp_path / "none", keep=1, milestone_every=0).load_latest() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_newest_falls_back_loudly(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path, keep=3, milestone_every=0)
    for step in (1, 2):
        store.save(whole(step, model={"weights": torch.arange(5000.0) + step}), step)
    path = store.path(2)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        # A bit in the middle of the weights: torch alone would load it without a word.
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert not torch.equal(torch.load(path, weights_only=True)["model"]["weights"], torch.arange(5000.0) + 2)
    elif damage == "empty":
        content = b""
    else:
        content = b"not a checkpoint"
    path.write_bytes(content)
    assert store.load_latest()["step"] == 1
    assert str(path) in caplog.text and "falling back" in caplog.text
    store.path(1).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        store.load_latest()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "step_00000001.pt"
    write_checkpoint(path, {"value": 1})
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"value": lambda: None})
    assert read_checkpoint(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match=r"cannot read .*it holds objects \(getattr\)"):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(CheckpointError, match="is no file of PyTorch"):
        read_checkpoint(tmp_path / "text.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        read_checkpoint(tmp_path / "empty.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match="an archive, but not one of PyTorch"):
        read_checkpoint(tmp_path / "arrays.npz")
    torch.save(1, tmp_path / "number.pt")
    with pytest.raises(CheckpointError, match="holds a int, not a checkpoint"):
        read_checkpoint(tmp_path / "number.pt")


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle in a file of ``torch.save``."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize("core", [b"core", b"_core"], ids=["numpy 1", "numpy 2"])
def test_numpy_scalars_are_read_as_numbers(core, tmp_path):
    """Which the learning rate is in what the public codes save; other numpy objects are refused."""
    numbers = {"lr": np.float64(2e-4) / 3, "half": np.float16(0.1), "step": np.int64(-7), "yes": np.bool_(True)}
    torch.save({"optimizer": [numbers]}, tmp_path / "public.pth")
    with_pickle(tmp_path / "public.pth", lambda content: re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", content))
    state = read_checkpoint(tmp_path / "public.pth")
    assert state == {"optimizer": [numbers]}
    assert [type(value) for value in state["optimizer"][0].values()] == [float, float, int, bool]
    for code in (b"O8", b"M8", b"V8"):
        with_pickle(tmp_path / "public.pth", lambda content, code=code: re.sub(b"f8", code, content))
        with pytest.raises(CheckpointError, match=f"a numpy scalar of type '{code.decode()}'"):
            read_checkpoint(tmp_path / "public.pth")
        with_pickle(tmp_path / "public.pth", lambda content, code=code: re.sub(code, b"f8", content))
    torch.save({"optimizer": np.zeros(3)}, tmp_path / "array.pth")
    with pytest.raises(CheckpointError, match=r"it holds objects \(numpy\._?core\.multiarray\._reconstruct\)"):
        read_checkpoint(tmp_path / "array.pth")


# -------------------------------------------------------------------------------------------------------------- damage


def plain(value: object) -> object:
    """A checkpoint as what ``==`` compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def test_a_flipped_bit_in_the_directory_does_not_change_what_is_read(tmp_path):
    """With this one of the directory's external attributes torch alone reads nothing into fresh memory."""
    path, weights = tmp_path / "flipped.pt", torch.arange(1000.0)
    torch.save({"weights": weights}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"/data/0") - 46 - len("flipped")
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], weights)
    assert torch.equal(read_checkpoint(path)["weights"], weights)


def test_claims_of_more_than_there_is_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(100_000)}, tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="claims to hold more than it does"):
        read_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.faults
def test_a_flipped_bit_is_reported_or_changes_nothing(tmp_path, run_state):
    """In 4000 random places of a checkpoint."""
    path, draw = tmp_path / "flipped.pt", random.Random(0)
    write_checkpoint(path, run_state)
    whole, expected, refused = path.read_bytes(), plain(run_state), 0
    for bit in draw.sample(range(8 * len(whole)), 4000):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert plain(read_checkpoint(path)) == expected, bit
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 1000 < refused < 4000


def test_unreadable_checkpoints_do_not_count_as_kept(tmp_path, caplog):
    """A run that fell back from two damaged checkpoints keeps what it saves next; the damaged ones are set aside."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(whole(step), step)
    for step in (2, 3):
        store.path(step).write_bytes(b"damaged")
    write_checkpoint(store.path(1), whole(1))
    resumed = CheckpointStore(tmp_path, keep=2)
    assert resumed.load_latest()["step"] == 1
    resumed.save(whole(2), 2)
    assert CheckpointStore(tmp_path).load_latest()["step"] == 2
    assert resumed.steps() == [1, 2]
    assert [path.name for path in tmp_path.glob("*.damaged")] == ["step_00000003.pt.damaged"]


# ------------------------------------------------------------------------------------------------- what is in a file


class Run:
    """The least of a training run, two steps of it."""

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.path = workdir, workdir / "checkpoints" / "step_00000002.pt"

    def train(self, n_iters: int = 3) -> None:
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(module.parameters(), fused=True)
        options = dict(n_iters=n_iters, log_freq=5, save_freq=2, ema=EMA(module, 0.9))
        fit(module, optimizer, lambda net, step, _: {"loss": net(torch.ones(1, 3)).sum()}, self.workdir, **options)


@pytest.fixture(scope="module")
def run_state(tmp_path_factory) -> dict:
    run = Run(tmp_path_factory.mktemp("run"))
    run.train(2)
    return read_checkpoint(run.path) | {"sums": {"loss": [1.5, 2]}, "hooks_done": False}


def put(*keys: object, value: object) -> Callable[[dict], object]:
    """What replaces a part of a checkpoint."""

    def change(state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def remove(*keys: object) -> Callable[[dict], object]:
    def change(state: dict) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


SPARSE = torch.eye(2, 3).to_sparse()
META = torch.empty(2, 3, device="meta")
FORM, OPTIMISER = "missing, or of another form: ", "the optimiser state "
MALFORMED: list[tuple[str, Callable[[dict], object], str]] = [
    ("no step", remove("step"), FORM + "step"),
    ("step as text", put("step", value="2"), FORM + "step"),
    ("half a step", put("step", value=2.0), FORM + "step"),
    ("negative step", put("step", value=-2), FORM + "step"),
    ("vector of steps", put("step", value=torch.tensor([2, 2])), FORM + "step"),
    ("no model", remove("model"), FORM + "model"),
    ("list of weights", put("model", value=[1]), FORM + "model"),
    ("no weight", remove("model", "weight"), "weight is missing"),
    ("another weight", put("model", "more", value=torch.zeros(1)), "more is unexpected"),
    ("numbered weight", put("model", 7, value=torch.zeros(1)), "7 is unexpected"),
    ("weight as text", put("model", "weight", value="0"), "weight is a str instead of a tensor"),
    ("weight of another shape", put("model", "weight", value=torch.zeros(3, 2)), "has shape (3, 2) instead of (2, 3)"),
    ("half precision", put("model", "weight", value=torch.zeros(2, 3).half()), "another precision: weight is float16"),
    ("whole weight", put("model", "weight", value=torch.zeros(2, 3, dtype=int)), "weight is int64 instead of float32"),
    ("sparse weight", put("model", "weight", value=SPARSE), "weight is a tensor without plain numbers"),
    ("weight without memory", put("model", "weight", value=META), "weight is a tensor without plain numbers"),
    ("no average", put("ema", value=None), "it has no moving average"),
    ("average as text", put("ema", value="0"), FORM + "ema"),
    ("no num_updates", remove("ema", "num_updates"), FORM + "ema"),
    ("num_updates as text", put("ema", "num_updates", value="2"), FORM + "ema"),
    ("vector of num_updates", put("ema", "num_updates", value=torch.ones(2)), FORM + "ema"),
    ("average without weights", remove("ema", "model"), FORM + "ema"),
    ("average of another shape", put("ema", "model", "bias", value=torch.zeros(3)), "bias has shape (3,) instead of"),
    ("sparse average", put("ema", "model", "weight", value=SPARSE), "weight is a tensor without plain numbers"),
    ("optimiser as list", put("optimizer", value=[]), FORM + "optimizer"),
    ("optimiser of nothing", put("optimizer", value={}), OPTIMISER + "is not in torch's form"),
    ("groups as text", put("optimizer", "param_groups", value="00"), OPTIMISER + "is not in torch's form"),
    ("no groups", put("optimizer", "param_groups", value=[]), OPTIMISER + "is that of other parameters"),
    ("parameter short", put("optimizer", "param_groups", 0, "params", value=[0]), "is that of other parameters"),
    ("parameter more", put("optimizer", "state", 2, value={}), OPTIMISER + "is that of other parameters"),
    ("state as list", put("optimizer", "state", value=[1, 2]), OPTIMISER + "is not in torch's form"),
    ("moments as list", put("optimizer", "state", 0, value=[1]), OPTIMISER + "is not in torch's form"),
    ("no moment", remove("optimizer", "state", 0, "exp_avg"), "is step, exp_avg_sq, not that of Adam"),
    ("amsgrad", put("optimizer", "state", 0, "max_exp_avg_sq", value=META), "max_exp_avg_sq, not that of Adam"),
    ("short moment", put("optimizer", "state", 0, "exp_avg", value=torch.zeros(1)), "exp_avg has shape (1,)"),
    ("long moment", put("optimizer", "state", 1, "exp_avg_sq", value=torch.zeros(99)), "exp_avg_sq has shape (99,)"),
    ("double moment", put("optimizer", "state", 0, "exp_avg", value=torch.zeros(2, 3).double()), "float64 instead"),
    ("sparse moment", put("optimizer", "state", 0, "exp_avg", value=SPARSE), "exp_avg is a tensor without"),
    ("moment without memory", put("optimizer", "state", 0, "exp_avg", value=META), "exp_avg is a tensor without"),
    ("moment as number", put("optimizer", "state", 0, "exp_avg", value=0.0), "exp_avg is a float instead"),
    ("steps of the optimiser", put("optimizer", "state", 0, "step", value=torch.ones(2)), "step has shape (2,)"),
    ("step before the first", put("optimizer", "state", 0, "step", value=torch.tensor(-1.0)), "has done -1.0 steps"),
    ("scaler as list", put("scaler", value=[1]), FORM + "scaler"),
    ("sums as text", put("sums", value="0"), FORM + "sums"),
    ("empty sum", put("sums", "loss", value=[]), FORM + "sums"),
    ("sum of nothing", put("sums", "loss", value=[0.0, 0]), FORM + "sums"),
    ("vector of sums", put("sums", "loss", value=[torch.ones(2), 1]), FORM + "sums"),
    ("log size as text", put("log_size", value="9"), FORM + "log_size"),
    ("negative log size", put("log_size", value=-1), FORM + "log_size"),
    ("hooks perhaps done", put("hooks_done", value="perhaps"), FORM + "hooks_done"),
    ("record as text", put("record", value="0"), FORM + "record"),
    ("another version", put("version", value="two"), "a checkpoint of another version"),
    ("vector of versions", put("version", value=torch.full((2,), CHECKPOINT_VERSION)), "of another version"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_all_of_a_checkpoint_is_checked_before_it_is_used(change, message, run_state, tmp_path):
    """Training does not go on from it, and says in one line why; what it wrote before is left alone."""
    run, state = Run(tmp_path), copy.deepcopy(run_state)
    change(state)
    write_atomically(run.path, lambda file: torch.save(state, file))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        run.train()
    assert "\n" not in str(error.value) and str(run.path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_the_same_checkpoint_unchanged(run_state, tmp_path):
    run = Run(tmp_path)
    write_checkpoint(run.path, run_state)
    run.train()
    assert read_checkpoint(tmp_path / "checkpoints" / "step_00000003.pt")["ema"]["num_updates"] == 3


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapper_are_named(prefix):
    module = torch.nn.Linear(2, 3)
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"here: weights of a wrapper .*, whose names begin with '{prefix}'"):
        load_state_dict_strictly(module, state, "here")
