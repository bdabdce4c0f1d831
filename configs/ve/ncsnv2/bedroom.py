"""NCSNv2 on LSUN bedroom 128×128 (Song and Ermon, NeurIPS 2020; only samples published).

python main.py --config=configs/ve/ncsnv2/bedroom.py --workdir=runs/bedroom_ncsnv2 --mode=train \
    --config.data.path=FOLDER_OF_IMAGES
"""

from configs.defaults import base_config
from configs.presets import use_image_folder, use_ncsn


def get_config():
    config = use_ncsn(use_image_folder(base_config(), image_size=128), "ncsnv2_128")
    config.training.batch_size = 128
    config.model.update(sigma_max=190.0, num_scales=1086, ema_rate=0.9999)
    config.sampling.update(n_steps_each=3, snr=0.095)
    return config
