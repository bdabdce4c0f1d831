"""The training loop: closed-form descents, resumption bit for bit, hooks, losses that are not finite."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from checkpoints import CheckpointError, CheckpointStore
from experiment.runtime import Runtime
from models import EMA
from training import Hook, fit


class Killed(Exception):
    """Stands for the end of the process."""


class Regression:
    """A line fitted to noisy data that are drawn anew, and keyed by the step, in every step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fit(self, *, kill_in_loss: int = -1, nan_in_loss: int = -1, kill_in_hook: int = -1, **options) -> nn.Module:
        """One attempt, from the checkpoint in the folder; ``updates`` are those of the progress bar."""
        self.module = nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(0.5)
        self.average = EMA(self.module, 0.9)
        self.steps, self.updates = [], []

        def loss(module: nn.Module, step: int, positions: range) -> dict[str, torch.Tensor]:
            if step == kill_in_loss:
                raise Killed
            self.steps.append(step)
            x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
            error = ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()
            size = (module.weight**2).sum()
            return {"loss": error * (float("nan") if step == nan_in_loss else 1), "size": size}

        def hook(step: int) -> dict[str, float]:
            if step == kill_in_hook:
                raise Killed
            return {"hook": self.module.weight.sum().item()}

        settings = dict(n_iters=50, grad_clip=1.0, log_freq=7, save_freq=10, observe=self.observe, ema=self.average)
        settings |= dict(learning_rate=lambda step: 0.05 - 0.0005 * step, hooks=[Hook(15, hook)])
        settings |= dict(runtime=Runtime("cpu", on_progress=self.updates.append))
        optimizer = torch.optim.Adam(self.module.parameters(), lr=0.05)
        fit(self.module, optimizer, loss, self.directory, **settings | options)
        return self.module

    def observe(self) -> dict[str, float]:
        return {"weight": self.module.weight[0, 0].item()}

    def log(self) -> list[dict]:
        """Without what depends on the clock."""
        rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in rows]

    def checkpoint(self) -> dict:
        return CheckpointStore(self.directory / "checkpoints").load_latest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Regression:
    run = Regression(tmp_path_factory.mktemp("uninterrupted"))
    run.fit()
    return run


def assert_same(run: Regression, other: Regression) -> None:
    for (name, value), expected in zip(run.module.named_parameters(), other.module.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert run.log() == other.log()
    one, two = ({k: v for k, v in r.checkpoint().items() if k != "log_size"} for r in (run, other))
    assert str(one) == str(two)


# 0, 4: before any checkpoint; 10: just after one; 23: rows of the log after it; 29, 49: the step before one.
@pytest.mark.parametrize("kills", [[0], [4], [10], [23], [29, 49], [4, 4, 12, 13, 31]])
def test_killed_and_resumed_it_ends_at_the_same_weights_and_log(tmp_path, uninterrupted, kills):
    run = Regression(tmp_path)
    for kill in kills:
        with pytest.raises(Killed):
            run.fit(kill_in_loss=kill)
    run.fit()
    resumed_from = kills[-1] // 10 * 10
    assert run.steps == list(range(resumed_from, 50))
    assert run.updates == ([resumed_from] if resumed_from else []) + [1] * (50 - resumed_from)
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("kill", [15, 30, 45, 50])
def test_killed_in_a_hook(tmp_path, uninterrupted, kill):
    """Its row is written once: by a run that goes on from the checkpoint of that step, or from one before."""
    run = Regression(tmp_path)
    with pytest.raises(Killed):
        run.fit(kill_in_hook=kill)
    run.fit()
    assert_same(run, uninterrupted)
    assert [row["step"] for row in run.log() if "hook" in row] == [15, 30, 45, 50]


def test_killed_between_log_and_checkpoint(tmp_path, uninterrupted, monkeypatch):
    run = Regression(tmp_path)

    def killed(*_) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "save", killed)
        with pytest.raises(Killed):
            run.fit()  # in the first save, of step 10
    with monkeypatch.context() as patched:
        save = CheckpointStore.save
        patched.setattr(CheckpointStore, "save", lambda *given: killed() if given[2] == 50 else save(*given))
        with pytest.raises(Killed):
            run.fit()
    assert run.log()[-1]["step"] == 50  # written, and to be written again
    run.fit()
    assert_same(run, uninterrupted)


def test_killed_while_it_wrote_a_row(tmp_path, uninterrupted):
    run = Regression(tmp_path)
    with pytest.raises(Killed):
        run.fit(kill_in_loss=23)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-9] + b"\xff\xfe")
    run.fit()
    assert_same(run, uninterrupted)


def test_a_finished_run_is_left_alone(tmp_path, uninterrupted):
    """Only a checkpoint goes that it had no time to delete when it was killed."""
    run = Regression(uninterrupted.directory)
    log, store = run.log(), CheckpointStore(uninterrupted.directory / "checkpoints")
    shutil.copy(store.path(50), store.path(40))
    run.fit()
    assert store.steps() == [50]
    assert run.steps == [] and run.updates == [50]
    assert_same(run, uninterrupted)
    assert run.log() == log


def test_a_longer_run_continues_a_shorter_one(tmp_path, uninterrupted):
    run = Regression(tmp_path)
    run.fit(n_iters=20)
    run.fit()
    assert run.steps == list(range(20, 50))
    for value, expected in zip(run.module.parameters(), uninterrupted.module.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_log_holds_means_since_the_row_before_and_present_weights(tmp_path):
    """SGD on w²/2 with rate 1/10: w after k steps is w_0 0.9^k."""
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    module = nn.ParameterList([weight])
    terms = {"loss": lambda: 0.5 * weight**2, "weight": lambda: weight * 1}
    fit(
        module,
        torch.optim.SGD([weight], lr=1.0),
        lambda module, step, positions: {name: term() for name, term in terms.items()},
        tmp_path,
        learning_rate=lambda step: 0.1,
        n_iters=11,
        log_freq=4,
        save_freq=3,
        observe=lambda: {"now": weight.item()},
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row.get("lr") for row in rows} == {None, 0.1}
    expected = [2 * 0.9**k for k in range(12)]
    assert [row["step"] for row in rows] == [0, 4, 8, 11]
    assert rows[0] == {"step": 0, "now": 2.0}
    for row, since in zip(rows[1:], (range(0, 4), range(4, 8), range(8, 11)), strict=True):
        assert row["now"] == pytest.approx(expected[row["step"]], rel=1e-12)
        assert row["weight"] == pytest.approx(sum(expected[k] for k in since) / len(since), rel=1e-12)
        assert row["loss"] == pytest.approx(sum(expected[k] ** 2 / 2 for k in since) / len(since), rel=1e-12)
    assert (tmp_path / "tensorboard").is_dir()


def test_tensorboard_has_the_config_and_grids_of_samples(tmp_path):
    """The bytes of a PNG that a hook gives go to TensorBoard, and nothing of them to the log."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(picture, format="png")
    weight = nn.Parameter(torch.ones(1))
    fit(
        nn.ParameterList([weight]),
        torch.optim.SGD([weight], lr=0.1),
        lambda module, step, positions: {"loss": (weight**2).sum()},
        tmp_path,
        n_iters=2,
        record={"config": '{\n "seed": 3\n}'},
        hooks=[Hook(1, lambda step: {"samples": picture.getvalue()})],
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    images = events.Images("samples")
    assert [(image.step, image.width, image.height) for image in images] == [(1, 7, 5), (2, 7, 5)]
    assert images[0].encoded_image_string == picture.getvalue()
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val[0] == b'    {\n     "seed": 3\n    }'
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] and "samples" not in rows[0]


def test_gradient_norm_is_clipped(tmp_path):
    """On 5‖w‖² from w = (6, 8) the clipped step is 0.1 along w, whose norm falls from 10 to 9.5 in five steps."""
    weight = nn.Parameter(torch.tensor([6.0, 8.0], dtype=torch.float64))
    fit(
        nn.ParameterList([weight]),
        torch.optim.SGD([weight], lr=0.1),
        lambda module, step, positions: {"loss": 5 * (weight**2).sum()},
        tmp_path,
        n_iters=5,
        grad_clip=1.0,
    )
    # clip_grad_norm_ divides by norm + 1e-6.
    torch.testing.assert_close(weight.data, torch.tensor([5.7, 7.6], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("step", [19, 20, 25])
def test_loss_that_is_not_finite(tmp_path, step):
    run = Regression(tmp_path)
    with pytest.raises(FloatingPointError, match="not finite at or before step"):
        run.fit(nan_in_loss=step)
    state = run.checkpoint()
    assert state["step"] == (10 if step == 19 else 20)
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert max(row["step"] for row in run.log()) <= step
    assert all(value == value for row in run.log() for value in row.values())
    # With the cause removed it goes on from there.
    run.fit()
    assert run.steps[0] == state["step"]


def test_finite_loss_with_a_gradient_that_is_not(tmp_path):
    """√0 in the step of a checkpoint: the loss is 0, its gradient infinite, and the weights must not be stored."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    module = nn.ParameterList([weight])

    def loss(module: nn.Module, step: int, positions: range) -> dict[str, torch.Tensor]:
        return {"loss": ((0.0 if step == 3 else 1.0) * weight).sqrt().sum()}

    with pytest.raises(FloatingPointError, match="grad_norm is not finite at or before step 4"):
        fit(module, torch.optim.SGD([weight], lr=0.1), loss, tmp_path, n_iters=6, save_freq=2)
    state = CheckpointStore(tmp_path / "checkpoints").load_latest()
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_checkpoints_of_another_module_are_refused(tmp_path):
    run = Regression(tmp_path)
    run.fit(n_iters=5, ema=None)
    module = nn.Linear(4, 1)
    before = module.weight.clone()
    with pytest.raises(CheckpointError, match="another architecture: weight has shape"):
        fit(module, torch.optim.SGD(module.parameters(), lr=1.0), lambda *_: {}, tmp_path, n_iters=9)
    assert torch.equal(module.weight, before)


def test_milestones_are_saved_and_kept_between_other_checkpoints(tmp_path):
    run = Regression(tmp_path)
    run.fit(save_freq=20, milestone_freq=15)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [15, 30, 45, 50]
