"""NCSN on CelebA 64×64, with techniques 1, 2 and 4 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/celeba_124.py --workdir=runs/celeba_ncsn_124 --mode=train
"""

from configs.presets import CELEBA, CELEBA_LEVELS, NCSN, preset

get_config = preset(CELEBA, NCSN, CELEBA_LEVELS)
