"""NCSN++ (cont.) on FFHQ 1024×1024, VE SDE; the public checkpoint is called ffhq_1024_ncsnpp_continuous.

Song et al. (ICLR 2021) and their public code; only samples published.

python main.py --config=configs/ve/ffhq_ncsnpp_continuous.py --workdir=runs/ffhq --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.presets import ncsnpp_1024


def get_config():
    config = ncsnpp_1024()
    config.training.reduce_mean = True
    return config
