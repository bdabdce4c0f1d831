"""DDPM++ on CIFAR-10, VP in discrete time (Song et al., ICLR 2021, Table 3: FID 2.78, IS 9.64).

python main.py --config=configs/vp/cifar10_ddpmpp.py --workdir=runs/vp_ddpmpp_discrete --mode=train
"""

from configs.defaults import base_config
from configs.presets import use_discrete_vp


def get_config():
    return use_discrete_vp(base_config())
