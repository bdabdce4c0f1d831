"""NCSNv2 on CelebA 64×64 (Song and Ermon, NeurIPS 2020: FID 10.23).

python main.py --config=configs/ve/ncsnv2/celeba.py --workdir=runs/celeba_ncsnv2 --mode=train
"""

from configs.presets import CELEBA, CELEBA_LEVELS, NCSN, NCSNV2, preset

get_config = preset(CELEBA, NCSN, NCSNV2, CELEBA_LEVELS)
