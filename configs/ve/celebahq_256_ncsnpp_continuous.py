"""NCSN++ (cont.) on CelebA-HQ 256×256, VE SDE (Song et al., ICLR 2021; only samples published).

python main.py --config=configs/ve/celebahq_256_ncsnpp_continuous.py --workdir=runs/celebahq_256 --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ncsnpp_256


def get_config():
    return ncsnpp_256(sigma_max=348.0)
