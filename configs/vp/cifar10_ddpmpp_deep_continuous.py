"""DDPM++ (cont., deep) on CIFAR-10, VP SDE.

Song et al. (ICLR 2021), Table 2: NLL 3.13 bits/dim, FID 3.08 by ODE; Table 3: FID 2.41 by PC.

python main.py --config=configs/vp/cifar10_ddpmpp_deep_continuous.py --workdir=runs/vp_ddpmpp_deep --mode=train
"""

from configs.defaults import base_config, use_vp


def get_config():
    config = use_vp(base_config(), "vpsde")
    config.training.n_iters = 950001
    config.model.num_res_blocks = 8
    return config
