"""DDPM++ on CIFAR-10, VP in discrete time (Song et al., ICLR 2021, Table 3: FID 2.78, IS 9.64).

python main.py --config=configs/vp/cifar10_ddpmpp.py --workdir=runs/vp_ddpmpp_discrete --mode=train
"""

from configs.presets import DISCRETE_VP, VP, preset

get_config = preset(VP, DISCRETE_VP)
