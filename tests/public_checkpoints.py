"""Public checkpoints, read into a network by itself."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from checkpoints import load_state_dict_strictly, read_checkpoint
from models import NoiseLevel
from models.published import PublicCheckpoint
from sde_lib import SDE


def read_public(path: Path) -> PublicCheckpoint:
    return PublicCheckpoint(read_checkpoint(path), path)


def load_score_sde_checkpoint(path: Path, network: nn.Module, ema: bool, sde: SDE | None = None) -> int:
    """Load the weights, or with ``ema`` their averages; returns the step."""
    checkpoint = read_public(path)
    if sde is not None:
        checkpoint.check_noise_levels(NoiseLevel(sde))
    load_state_dict_strictly(network, checkpoint.averages(network) if ema else checkpoint.weights(network), path)
    return checkpoint.step
