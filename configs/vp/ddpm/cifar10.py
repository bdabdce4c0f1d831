"""DDPM on CIFAR-10, VP in discrete time (Song et al., 2021: FID 3.24, by ODE 3.37; NLL 3.28 bits/dim).

python main.py --config=configs/vp/ddpm/cifar10.py --workdir=runs/vp_ddpm_discrete --mode=train
"""

from configs.presets import DDPM, DISCRETE_VP, VP, preset

get_config = preset(VP, DISCRETE_VP, DDPM)
