"""DDPM on CIFAR-10, VP in discrete time, its network not told the time (no public checkpoint).

python main.py --config=configs/vp/ddpm/cifar10_unconditional.py --workdir=runs/vp_ddpm_unconditional --mode=train
"""

from configs.presets import DDPM, DISCRETE_VP, VP, preset

get_config = preset(VP, DISCRETE_VP, DDPM, {"model.conditional": False})
