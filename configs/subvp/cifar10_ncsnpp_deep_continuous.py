"""NCSN++ (cont., deep) on CIFAR-10, sub-VP SDE (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/subvp/cifar10_ncsnpp_deep_continuous.py --workdir=runs/subvp_ncsnpp_deep --mode=train
"""

from configs.presets import DEEP, NCSNPP_ON_VP, SUB_VP, VP, preset

get_config = preset(VP, SUB_VP, NCSNPP_ON_VP, DEEP)
