"""NCSN++ on CIFAR-10, VP in discrete time (Song et al., ICLR 2021; no public checkpoint).

python main.py --config=configs/vp/cifar10_ncsnpp.py --workdir=runs/vp_ncsnpp_discrete --mode=train
"""

from configs.presets import NCSNPP_ON_VP, VP, preset

get_config = preset(VP, NCSNPP_ON_VP, {"training.continuous": False, "sampling.predictor": "reverse_diffusion"})
