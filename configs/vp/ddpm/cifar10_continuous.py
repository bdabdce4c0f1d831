"""DDPM's network (cont.) on CIFAR-10, VP SDE; the public checkpoint is called vp/cifar10_ddpm_continuous.

Song et al. (ICLR 2021): FID by ODE 3.69; NLL 3.21 bits/dim.

python main.py --config=configs/vp/ddpm/cifar10_continuous.py --workdir=runs/vp_ddpm --mode=train
"""

from configs.defaults import base_config, use_vp
from configs.presets import use_ddpm


def get_config():
    return use_ddpm(use_vp(base_config(), "vpsde"))
