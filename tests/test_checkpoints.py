"""Checkpoints survive crashes and damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import (
    CheckpointError,
    CheckpointStore,
    load_state_dict_strictly,
    read_checkpoint,
    write_checkpoint,
)


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
        store.save({"step": step}, step)
    assert store.steps() == [100, 200, 250, 260]
    assert store.load_latest()["step"] == 260
    assert CheckpointStore(tmp_path / "none", keep=1, milestone_every=0).load_latest() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_newest_falls_back_loudly(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path, keep=3, milestone_every=0)
    for step in (1, 2):
        store.save({"step": step, "weights": torch.arange(5000.0) + step}, step)
    path = store.path(2)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        # A bit in the middle of the weights: torch alone would load it without a word.
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(5000.0) + 2)
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
    with pytest.raises(CheckpointError, match="cannot read"):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nothing.pt")
    torch.save(1, tmp_path / "number.pt")
    with pytest.raises(CheckpointError, match="holds a int, not a checkpoint"):
        read_checkpoint(tmp_path / "number.pt")
