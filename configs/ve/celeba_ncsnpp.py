"""NCSN++ on CelebA 64×64, VE in discrete time (Song et al., ICLR 2021, Appendix H).

python main.py --config=configs/ve/celeba_ncsnpp.py --workdir=runs/celeba_ncsnpp --mode=train
"""

from configs.presets import CELEBA, SMLD, preset

get_config = preset(CELEBA, SMLD)
