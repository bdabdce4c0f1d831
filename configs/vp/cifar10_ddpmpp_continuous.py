"""DDPM++ (cont.) on CIFAR-10, VP SDE.

Song et al. (ICLR 2021), Table 2: NLL 3.16 bits/dim, FID 3.93 by ODE; Table 3: FID 2.55 by PC.

python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py --workdir=runs/vp_ddpmpp --mode=train
"""

from configs.defaults import base_config, use_vp


def get_config():
    return use_vp(base_config(), "vpsde")
