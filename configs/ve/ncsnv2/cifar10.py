"""NCSNv2 on CIFAR-10 (Song and Ermon, NeurIPS 2020: FID 10.87, IS 8.40).

python main.py --config=configs/ve/ncsnv2/cifar10.py --workdir=runs/cifar10_ncsnv2 --mode=train
"""

from configs.presets import CIFAR10_LEVELS, NCSN, NCSNV2, preset

get_config = preset(NCSN, NCSNV2, CIFAR10_LEVELS)
