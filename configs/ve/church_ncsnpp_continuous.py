"""NCSN++ (cont.) on LSUN church_outdoor 256×256, VE SDE (Song et al., ICLR 2021; only samples published).

python main.py --config=configs/ve/church_ncsnpp_continuous.py --workdir=runs/church --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ncsnpp_256


def get_config():
    return ncsnpp_256(sigma_max=380.0)
