"""NCSN on CelebA 64×64 (Song and Ermon, NeurIPS 2019).

python main.py --config=configs/ve/ncsn/celeba.py --workdir=runs/celeba_ncsn --mode=train
"""

from configs.presets import NCSN_LEVELS, ncsn_config


def get_config():
    return ncsn_config(NCSN_LEVELS, celeba=True)
