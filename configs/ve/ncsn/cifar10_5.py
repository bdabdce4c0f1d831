"""NCSN on CIFAR-10, with technique 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/cifar10_5.py --workdir=runs/cifar10_ncsn_5 --mode=train
"""

from configs.presets import AVERAGED, NCSN, NCSN_LEVELS, preset

get_config = preset(NCSN, NCSN_LEVELS, AVERAGED)
