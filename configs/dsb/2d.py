"""Schrödinger bridges in the plane (De Bortoli et al., NeurIPS 2021), on a laptop.

python -m schrodinger_bridge.main --config=configs/dsb/2d.py:scurve --workdir=runs/dsb/scurve
python -m schrodinger_bridge.main --config=configs/dsb/2d.py:moons-8gaussians --workdir=runs/dsb/moons-8gaussians

The argument is DATASET (to a Gaussian), DATASET-DATASET, or gaussian, which can be solved exactly. The expected
numbers are in schrodinger_bridge/README.md.
"""

from configs.dsb.common import COMMON, POINT_SETS, POINTS
from configs.fields import make_config

# The source has 20 steps of 0.01. The noise that the last step goes without, 2γ per coordinate, is a part of the
# coupling's cost: with these steps that comes within 5 % of the static bridge's.
STEPS = {"bridge": dict(num_steps=40, gamma_min=0.005, gamma_max=0.005), "optim.cosine_decay": True}
# A network that linear algebra can be compared with.
GAUSSIAN = {"data.dataset": "correlated_gaussian", "model.name": "affine", "optim.lr": 2e-2}
GAUSSIAN |= {"training": dict(batch_size=2048, n_iters=400)}


def get_config(pair="scurve"):
    first, joined, last = pair.partition("-")
    if pair != "gaussian" and not {first, last if joined else first} <= set(POINT_SETS):
        raise ValueError(
            f"config argument {pair!r}: allowed are gaussian, DATASET and DATASET-DATASET with DATASET one of "
            f"{', '.join(POINT_SETS)}"
        )
    ends = GAUSSIAN if pair == "gaussian" else {"data.dataset": first, "final.dataset": last or "gaussian"}
    return make_config(COMMON | POINTS, STEPS, ends)
