"""NCSN++ (cont.) on FFHQ 256×256, VE SDE (Song et al., ICLR 2021; only samples published).

python main.py --config=configs/ve/ffhq_256_ncsnpp_continuous.py --workdir=W --mode=train --config.data.path=FOLDER
"""

from configs.presets import IMAGE_FOLDER, NCSNPP_256, preset

get_config = preset(IMAGE_FOLDER, NCSNPP_256, {"model.sigma_max": 348.0})
