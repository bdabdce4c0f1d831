"""NCSN on CIFAR-10, with techniques 1, 2 and 4 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/cifar10_124.py --workdir=runs/cifar10_ncsn_124 --mode=train
"""

from configs.presets import CIFAR10_LEVELS, NCSN, preset

get_config = preset(NCSN, CIFAR10_LEVELS)
