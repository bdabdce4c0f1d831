"""NCSN++ (cont.) on CelebA-HQ 1024×1024, VE SDE (Song et al., ICLR 2021, Appendix H; only samples published).

python main.py --config=configs/ve/celebahq_ncsnpp_continuous.py --workdir=runs/celebahq --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ncsnpp_1024


def get_config():
    return ncsnpp_1024()
