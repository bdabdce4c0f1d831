"""DDPM's network (cont.) on CIFAR-10, sub-VP SDE (Song et al., 2021: FID by ODE 3.56; NLL 3.05 bits/dim).

python main.py --config=configs/subvp/cifar10_ddpm_continuous.py --workdir=runs/subvp_ddpm --mode=train
"""

from configs.presets import DDPM, SUB_VP, VP, preset

get_config = preset(VP, SUB_VP, DDPM)
