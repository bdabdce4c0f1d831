"""NCSN on CIFAR-10, with techniques 1, 2, 4 and 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/cifar10_1245.py --workdir=runs/cifar10_ncsn_1245 --mode=train
"""

from configs.presets import AVERAGED, CIFAR10_LEVELS, NCSN, preset

get_config = preset(NCSN, CIFAR10_LEVELS, AVERAGED)
