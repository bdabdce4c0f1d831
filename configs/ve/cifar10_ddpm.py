"""DDPM's network on CIFAR-10, VE in discrete time (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/ve/cifar10_ddpm.py --workdir=runs/ve_ddpm --mode=train
"""

from configs.presets import DDPM, SMLD, preset

get_config = preset(SMLD, DDPM)
