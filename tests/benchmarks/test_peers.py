"""Public codes beside ours: their modules have the names of ours."""

import importlib
import sys

import pytest
import torch.utils.cpp_extension

import losses
import models.score
from benchmarks import peers


def test_modules_of_a_folder_are_imported_in_place_of_ours_and_ours_come_back(tmp_path):
    """Packages without __init__.py as well; without compiling anything, and without TensorFlow."""
    (tmp_path / "losses.py").write_text(
        "import tensorflow as tf\nfrom torch.utils.cpp_extension import load\nop = load('x', [])"
    )
    for folder in ("models", "configs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "theirs.py").write_text("import losses")
    load, before = torch.utils.cpp_extension.load, dict(sys.modules)
    with peers.imported_from(tmp_path):
        theirs = [importlib.import_module(f"{package}.theirs") for package in ("models", "configs")]
    assert all(module.losses.__file__ == str(tmp_path / "losses.py") and module.losses.op is None for module in theirs)
    assert importlib.import_module("losses") is losses and importlib.import_module("models.score") is models.score
    assert torch.utils.cpp_extension.load is load
    assert {name: sys.modules.get(name) for name in before} == before and "models.theirs" not in sys.modules


def test_a_folder_is_needed_and_must_be_the_code(tmp_path):
    with pytest.raises(ValueError, match=r"--qcsbm, --score_sde: give at least one folder"):
        peers.run()
    with pytest.raises(ValueError, match=r"--score_sde=.*: is not score_sde_pytorch: it has no models/ncsnpp\.py"):
        peers.run(score_sde=str(tmp_path))
    with pytest.raises(ValueError, match=r"--what=speed: allowed are"):
        peers.run(score_sde=str(tmp_path), what=("speed",))
