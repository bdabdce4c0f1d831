"""DDPM++ (cont.) on CIFAR-10, sub-VP SDE.

Song et al. (ICLR 2021), Table 2: NLL 3.02 bits/dim, FID 3.16 by ODE; Table 3: FID 2.61 by PC.

python main.py --config=configs/subvp/cifar10_ddpmpp_continuous.py --workdir=runs/subvp_ddpmpp --mode=train
"""

from configs.defaults import base_config, use_vp


def get_config():
    return use_vp(base_config(), "subvpsde")
