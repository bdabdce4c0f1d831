"""DDPM++ (cont., deep) on CIFAR-10, sub-VP SDE (Song et al., ICLR 2021).

Their Table 2: NLL 2.99 bits/dim, FID 2.92 by ODE; Table 3: FID 2.41 by PC.

python main.py --config=configs/subvp/cifar10_ddpmpp_deep_continuous.py --workdir=runs/subvp_ddpmpp_deep --mode=train
"""

from configs.defaults import base_config, use_vp


def get_config():
    config = use_vp(base_config(), "subvpsde")
    config.training.n_iters = 950001
    config.model.num_res_blocks = 8
    return config
