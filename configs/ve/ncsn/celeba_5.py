"""NCSN on CelebA 64×64, with technique 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/celeba_5.py --workdir=runs/celeba_ncsn_5 --mode=train
"""

from configs.presets import AVERAGED, CELEBA, NCSN, NCSN_LEVELS, preset

get_config = preset(CELEBA, NCSN, NCSN_LEVELS, AVERAGED)
