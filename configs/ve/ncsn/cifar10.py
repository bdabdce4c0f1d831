"""NCSN on CIFAR-10 (Song and Ermon, NeurIPS 2019: FID 25.32, IS 8.87).

python main.py --config=configs/ve/ncsn/cifar10.py --workdir=runs/cifar10_ncsn --mode=train
"""

from configs.presets import NCSN, NCSN_LEVELS, preset

get_config = preset(NCSN, NCSN_LEVELS)
