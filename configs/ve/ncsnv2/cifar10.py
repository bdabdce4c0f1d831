"""NCSNv2 on CIFAR-10 (Song and Ermon, NeurIPS 2020: FID 10.87, IS 8.40).

python main.py --config=configs/ve/ncsnv2/cifar10.py --workdir=runs/cifar10_ncsnv2 --mode=train
"""

from configs.defaults import base_config
from configs.presets import CIFAR10_LEVELS, use_ncsn


def get_config():
    config = use_ncsn(base_config(), "ncsnv2_64")
    config.update_from_flattened_dict(CIFAR10_LEVELS)
    return config
