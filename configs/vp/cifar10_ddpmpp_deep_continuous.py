"""DDPM++ (cont., deep) on CIFAR-10, VP SDE (Song et al., 2021: NLL 3.13 bits/dim; FID 3.08 by ODE, 2.41 by PC).

python main.py --config=configs/vp/cifar10_ddpmpp_deep_continuous.py --workdir=runs/vp_ddpmpp_deep --mode=train
"""

from configs.presets import DEEP, VP, preset

get_config = preset(VP, DEEP)
