"""NCSN++ (cont., deep) on CIFAR-10, VE SDE (Song et al., ICLR 2021, Table 3: FID 2.20, IS 9.89).

python main.py --config=configs/ve/cifar10_ncsnpp_deep_continuous.py --workdir=runs/ve_ncsnpp_deep --mode=train
"""

from configs.presets import DEEP, preset

get_config = preset(DEEP)
