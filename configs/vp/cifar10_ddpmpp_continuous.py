"""DDPM++ (cont.) on CIFAR-10, VP SDE (Song et al., 2021: NLL 3.16 bits/dim; FID 3.93 by ODE, 2.55 by PC).

python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py --workdir=runs/vp_ddpmpp --mode=train
"""

from configs.presets import VP, preset

get_config = preset(VP)
