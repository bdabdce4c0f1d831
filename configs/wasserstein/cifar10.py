"""Nine forward processes on CIFAR-10 (Gao, Nguyen, Zhu, JMLR 2025): small NCSN++ (VE) and DDPM++ (VP).

python main.py --config=configs/wasserstein/cifar10.py:ve_v1 --workdir=runs/wasserstein/ve_v1 --mode=train
python main.py --config=configs/wasserstein/cifar10.py:ve_v1 --workdir=runs/wasserstein/ve_v1 --mode=eval

The names are the paper's. ve and vp are the processes of Song et al. The variants of VE have a g that is constant (v1),
√(2ct) (v2) or (b + at)^{ρ−½} with ρ = 2 (v3); those of VP a β that is constant (v1), (b + at)² (v2) or abᵗ (v3). cosine
is a ninth. The paper's code solves the reverse process of v1 to v3 of VE with another g (docs/deviations.md).
"""

from configs.presets import VP as VP_SDE
from configs.presets import preset

VE = {
    "ve": {"model.schedule": "geometric"},
    "ve_v1": {"model.schedule": "constant"},
    "ve_v2": {"model.schedule": "square_root"},
    "ve_v3": {"model.schedule": "polynomial", "model.rho": 2.0},
}
VP = {
    "vp": {"model.schedule": "linear"},
    "vp_v1": {"model.schedule": "constant", "model.beta_max": 10.0},
    "vp_v2": {"model.schedule": "power", "model.rho": 2.0},
    "vp_v3": {"model.schedule": "exponential", "model.beta_max": 30.0},
    "cosine": {"model.schedule": "cosine", "model.beta_max": 999.0},
}
MODELS = VE | VP
SMALL = {"model.nf": 32, "training.batch_size": 16, "eval.num_samples": 20_000}
get_config = preset(SMALL, variants=VE | {name: VP_SDE | schedule for name, schedule in VP.items()})
