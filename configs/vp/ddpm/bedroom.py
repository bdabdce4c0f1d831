"""DDPM on LSUN bedroom 256×256, VP in discrete time (Ho et al., NeurIPS 2020; no public checkpoint in PyTorch).

python main.py --config=configs/vp/ddpm/bedroom.py --workdir=runs/bedroom_ddpm --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ddpm_256


def get_config():
    return ddpm_256()
