"""DDPM's network (cont.) on CIFAR-10, VP SDE (Song et al., 2021: FID by ODE 3.69; NLL 3.21 bits/dim).

python main.py --config=configs/vp/ddpm/cifar10_continuous.py --workdir=runs/vp_ddpm --mode=train
"""

from configs.presets import DDPM, VP, preset

get_config = preset(VP, DDPM)
