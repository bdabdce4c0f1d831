"""DDPM's network (cont.) on CIFAR-10, sub-VP SDE.

Song et al. (ICLR 2021): FID by ODE 3.56; NLL 3.05 bits/dim.

python main.py --config=configs/subvp/cifar10_ddpm_continuous.py --workdir=runs/subvp_ddpm --mode=train
"""

from configs.defaults import base_config, use_vp
from configs.presets import use_ddpm


def get_config():
    return use_ddpm(use_vp(base_config(), "subvpsde"))
