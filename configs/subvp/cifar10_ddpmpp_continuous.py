"""DDPM++ (cont.) on CIFAR-10, sub-VP SDE (Song et al., 2021: NLL 3.02 bits/dim; FID 3.16 by ODE, 2.61 by PC).

python main.py --config=configs/subvp/cifar10_ddpmpp_continuous.py --workdir=runs/subvp_ddpmpp --mode=train
"""

from configs.presets import SUB_VP, VP, preset

get_config = preset(VP, SUB_VP)
