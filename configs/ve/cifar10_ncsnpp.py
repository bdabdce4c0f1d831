"""NCSN++ on CIFAR-10, VE in discrete time (Song et al., ICLR 2021, Table 3: FID 2.45, IS 9.73).

python main.py --config=configs/ve/cifar10_ncsnpp.py --workdir=runs/ve_ncsnpp_discrete --mode=train
"""

from configs.presets import SMLD, preset

get_config = preset(SMLD)
