"""DDPM on CIFAR-10, VP in discrete time, its network not told the time (no public checkpoint).

python main.py --config=configs/vp/ddpm/cifar10_unconditional.py --workdir=runs/vp_ddpm_unconditional --mode=train
"""

from configs.defaults import base_config
from configs.presets import use_ddpm, use_discrete_vp


def get_config():
    config = use_ddpm(use_discrete_vp(base_config()))
    config.model.conditional = False
    return config
