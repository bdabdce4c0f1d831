"""NCSN on CelebA 64×64, with techniques 1, 2, 4 and 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/celeba_1245.py --workdir=runs/celeba_ncsn_1245 --mode=train
"""

from configs.presets import AVERAGED, CELEBA, CELEBA_LEVELS, NCSN, preset

get_config = preset(CELEBA, NCSN, CELEBA_LEVELS, AVERAGED)
