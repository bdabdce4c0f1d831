"""NCSN++ (cont.) on CIFAR-10, VP SDE (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/vp/cifar10_ncsnpp_continuous.py --workdir=runs/vp_ncsnpp --mode=train
"""

from configs.presets import NCSNPP_ON_VP, VP, preset

get_config = preset(VP, NCSNPP_ON_VP)
