"""NCSN++ (cont.) on CIFAR-10, VE SDE (Song et al., ICLR 2021, Table 3: FID 2.38, IS 9.83).

python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=runs/ve_ncsnpp --mode=train
"""

from configs.presets import preset

get_config = preset()
