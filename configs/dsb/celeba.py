"""A Schrödinger bridge from CelebA, 64×64, to N(0, 1): 50 steps, U-Net (De Bortoli et al., NeurIPS 2021).

torchrun --nproc_per_node=4 -m schrodinger_bridge.main --config=configs/dsb/celeba.py --workdir=runs/dsb/celeba

CelebA is looked for in downloads/ (docs/own_data.md). This has not been run: it is for several GPUs.
"""

from configs.dsb.common import image_config


def get_config():
    config = image_config("CELEBA", 64, 3)
    config.bridge.update(num_ipf=20, num_steps=50)
    config.model.update(nf=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,))
    config.optim.lr = 1e-4
    config.training.update(n_iters=5000, batch_size=128, cache_size=512, refresh_freq=100, save_freq=1000)
    config.evaluation.update(num_samples=1000, batch_size=100)
    return config
