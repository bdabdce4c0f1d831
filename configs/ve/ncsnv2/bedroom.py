"""NCSNv2 on LSUN bedroom 128×128 (Song and Ermon, NeurIPS 2020; only samples published).

python main.py --config=configs/ve/ncsnv2/bedroom.py --workdir=W --mode=train --config.data.path=FOLDER
"""

from configs.presets import IMAGE_FOLDER, NCSN, NCSNV2, preset

BEDROOM = {
    "data.image_size": 128,
    "training.batch_size": 128,
    "model": dict(name="ncsnv2_128", sigma_max=190.0, num_scales=1086, ema_rate=0.9999),
    "sampling": dict(n_steps_each=3, snr=0.095),
}
get_config = preset(IMAGE_FOLDER, NCSN, NCSNV2, BEDROOM)
