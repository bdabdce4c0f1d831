"""NCSN++ on CelebA 64×64, VE in discrete time (Song et al., ICLR 2021, Appendix H).

python main.py --config=configs/ve/celeba_ncsnpp.py --workdir=runs/celeba_ncsnpp --mode=train
"""

from configs.defaults import base_config
from configs.presets import use_celeba, use_smld


def get_config():
    return use_smld(use_celeba(base_config()))
