"""DDPM++ (cont., deep) on CIFAR-10, sub-VP SDE (Song et al., 2021: NLL 2.99 bits/dim; FID 2.92 by ODE, 2.41 by PC).

python main.py --config=configs/subvp/cifar10_ddpmpp_deep_continuous.py --workdir=runs/subvp_ddpmpp_deep --mode=train
"""

from configs.presets import DEEP, SUB_VP, VP, preset

get_config = preset(VP, SUB_VP, DEEP)
