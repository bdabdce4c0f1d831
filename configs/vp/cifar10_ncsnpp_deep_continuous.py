"""NCSN++ (cont., deep) on CIFAR-10, VP SDE (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/vp/cifar10_ncsnpp_deep_continuous.py --workdir=runs/vp_ncsnpp_deep --mode=train
"""

from configs.defaults import base_config, use_vp
from configs.presets import use_ncsnpp_on_vp


def get_config():
    config = use_ncsnpp_on_vp(use_vp(base_config(), "vpsde"))
    config.training.n_iters = 950001
    config.model.num_res_blocks = 8
    return config
