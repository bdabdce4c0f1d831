"""NCSNv2 on CelebA 64×64 (Song and Ermon, NeurIPS 2020: FID 10.23).

python main.py --config=configs/ve/ncsnv2/celeba.py --workdir=runs/celeba_ncsnv2 --mode=train
"""

from configs.defaults import base_config
from configs.presets import CELEBA_LEVELS, use_celeba, use_ncsn


def get_config():
    config = use_ncsn(use_celeba(base_config()), "ncsnv2_64")
    config.update_from_flattened_dict(CELEBA_LEVELS)
    return config
