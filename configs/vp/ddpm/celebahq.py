"""DDPM on CelebA-HQ 256×256, VP in discrete time (Ho et al., NeurIPS 2020; no public checkpoint in PyTorch).

python main.py --config=configs/vp/ddpm/celebahq.py --workdir=runs/celebahq_ddpm --mode=train --config.data.path=FOLDER
"""

from configs.presets import DDPM, DDPM_256, DISCRETE_VP, IMAGE_FOLDER, VP, preset

get_config = preset(IMAGE_FOLDER, VP, DISCRETE_VP, DDPM, DDPM_256)
