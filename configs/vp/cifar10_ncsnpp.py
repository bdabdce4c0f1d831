"""NCSN++ on CIFAR-10, VP in discrete time (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/vp/cifar10_ncsnpp.py --workdir=runs/vp_ncsnpp_discrete --mode=train
"""

from configs.defaults import base_config, use_vp
from configs.presets import use_ncsnpp_on_vp


def get_config():
    config = use_ncsnpp_on_vp(use_vp(base_config(), "vpsde"))
    config.training.continuous = False
    config.sampling.predictor = "reverse_diffusion"
    return config
