"""NCSN on CelebA 64×64 (Song and Ermon, NeurIPS 2019).

python main.py --config=configs/ve/ncsn/celeba.py --workdir=runs/celeba_ncsn --mode=train
"""

from configs.presets import CELEBA, NCSN, NCSN_LEVELS, preset

get_config = preset(CELEBA, NCSN, NCSN_LEVELS)
