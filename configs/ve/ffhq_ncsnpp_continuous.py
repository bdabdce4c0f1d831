"""NCSN++ (cont.) on FFHQ 1024×1024, VE SDE (Song et al., ICLR 2021, and their public code; only samples published).

python main.py --config=configs/ve/ffhq_ncsnpp_continuous.py --workdir=runs/ffhq --mode=train --config.data.path=FOLDER
"""

from configs.presets import IMAGE_FOLDER, NCSNPP_256, NCSNPP_1024, preset

get_config = preset(IMAGE_FOLDER, NCSNPP_256, NCSNPP_1024, {"training.reduce_mean": True})
