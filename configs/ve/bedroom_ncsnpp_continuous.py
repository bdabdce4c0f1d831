"""NCSN++ (cont.) on LSUN bedroom 256×256, VE SDE (Song et al., ICLR 2021; only samples published).

python main.py --config=configs/ve/bedroom_ncsnpp_continuous.py --workdir=runs/bedroom --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ncsnpp_256


def get_config():
    return ncsnpp_256(sigma_max=378.0)
