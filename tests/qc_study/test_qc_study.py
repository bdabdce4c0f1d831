"""The study of QC: its statistics, its arms and their steps, the placebo, and the whole of it in small."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from qc_study_small import PART, make_small
from scipy import stats

from experiment.runtime import Runtime
from qc_study import analysis, arms, main, measures, plane
from qc_study.arms import PARTS, Arm, Placebo

COSTS = {"qc": 3.7, "lazy": 1.675, "placebo": 4.8}
STAGES = ("600", "1800", "6000")


# ---------------------------------------------------------------------------------------------------------- statistics


def simulated(effect: float, deviation: float, studies: int = 400) -> list[list[dict]]:
    """The primary analysis of studies with eight seeds and this effect at all three stages."""
    random = np.random.default_rng(0)
    draws = effect + deviation * random.standard_normal((studies, len(STAGES), 8))
    return [analysis.primary(dict(zip(STAGES, draw, strict=True))) for draw in draws]


def share(flags) -> tuple[float, float]:
    """Of what is true, with the standard error of the share."""
    flags = np.array(flags, dtype=float)
    return flags.mean(), math.sqrt(flags.mean() * (1 - flags.mean()) / len(flags))
