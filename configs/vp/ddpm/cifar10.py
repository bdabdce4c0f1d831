"""DDPM on CIFAR-10, VP in discrete time; the public checkpoint is called vp/cifar10_ddpm.

Song et al. (ICLR 2021): FID 3.24, by ODE 3.37; NLL 3.28 bits/dim.

python main.py --config=configs/vp/ddpm/cifar10.py --workdir=runs/vp_ddpm_discrete --mode=train
"""

from configs.defaults import base_config
from configs.presets import use_ddpm, use_discrete_vp


def get_config():
    return use_ddpm(use_discrete_vp(base_config()))
