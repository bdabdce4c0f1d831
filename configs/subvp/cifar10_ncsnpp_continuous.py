"""NCSN++ (cont.) on CIFAR-10, sub-VP SDE (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/subvp/cifar10_ncsnpp_continuous.py --workdir=runs/subvp_ncsnpp --mode=train
"""

from configs.defaults import base_config, use_vp
from configs.presets import use_ncsnpp_on_vp


def get_config():
    return use_ncsnpp_on_vp(use_vp(base_config(), "subvpsde"))
