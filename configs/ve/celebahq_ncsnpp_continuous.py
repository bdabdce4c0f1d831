"""NCSN++ (cont.) on CelebA-HQ 1024×1024, VE SDE (Song et al., ICLR 2021, Appendix H; only samples published).

python main.py --config=configs/ve/celebahq_ncsnpp_continuous.py --workdir=W --mode=train --config.data.path=FOLDER
"""

from configs.presets import IMAGE_FOLDER, NCSNPP_256, NCSNPP_1024, preset

get_config = preset(IMAGE_FOLDER, NCSNPP_256, NCSNPP_1024)
