"""What experiments share: overrides of ``configs.defaults`` for one process, network, data set or model family.

A field set to None is deleted, because the network does not read it. Facts are those of the papers' public configs,
score_sde_pytorch's and QCSBM's.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs.defaults import base_config
from configs.fields import Overrides, choose


def preset(*overrides: Overrides, variants: Mapping[str, Overrides] | None = None) -> Callable[..., ConfigDict]:
    """The ``get_config`` of a config file: ``overrides`` in order, then those of a variant, by default the first."""
    variants = variants or {"": {}}
    first = next(iter(variants))
    return lambda variant=first: choose(base_config(*overrides), variant, variants)


# DDPM++ on VP: centred data, positional embedding, no input pyramid (Song et al., 2021, Appendix H).
VP = {
    "data.centered": True,
    "training": dict(sde="vpsde", reduce_mean=True),
    "model": dict(scale_by_sigma=False, embedding_type="positional", fir=False, progressive_input="none"),
    "model.ema_rate": 0.9999,
    "sampling": dict(predictor="euler_maruyama", corrector="none"),
}
# After VP: sub-VP; discrete time, sampled as DDPM is; NCSN++, still with a positional embedding, instead of DDPM++.
SUB_VP = {"training.sde": "subvpsde"}
DISCRETE_VP = {"training.continuous": False, "sampling.predictor": "ancestral_sampling"}
NCSNPP_ON_VP = {"model": dict(fir=True, progressive_input="residual")}
# VE in discrete time: the network is told the index of the noise level.
SMLD = {"training.continuous": False, "model.embedding_type": "positional"}
DEEP = {"training.n_iters": 950001, "model.num_res_blocks": 8}

# What NCSN++ and DDPM++ can be told and DDPM cannot; and what all U-Nets can be told and NCSN and NCSNv2 cannot.
NCSNPP_FIELDS = ("embedding_type", "fourier_scale", "resblock_type", "fir", "fir_kernel", "skip_rescale")
NCSNPP_FIELDS += ("progressive", "progressive_input", "progressive_combine", "init_scale")
UNET_FIELDS = ("ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "conditional", "resamp_with_conv")

# The network of Ho et al. (2020).
DDPM = {"model": dict.fromkeys(NCSNPP_FIELDS) | dict(name="ddpm", num_res_blocks=2)}
# SMLD, sampled by annealed Langevin dynamics, without a moving average; and, after it, NCSNv2.
NCSN = {
    "model": dict.fromkeys(NCSNPP_FIELDS + UNET_FIELDS)
    | dict(name="ncsn", nonlinearity="elu", scale_by_sigma=False, ema_rate=0.0),
    "training.continuous": False,
    "optim": dict(lr=1e-3, warmup=0, grad_clip=-1.0),
    "sampling": dict(predictor="none", corrector="ald"),
}
AVERAGED = {"model.ema_rate": 0.999}
NCSNV2 = {"model": dict(name="ncsnv2_64", scale_by_sigma=True, ema_rate=0.999), "optim.lr": 1e-4}
# Song and Ermon (NeurIPS 2020) improve NCSN by five techniques: 1, 2 and 4 are more noise levels, up to a larger one,
# with as many Langevin steps in all; 5 is the moving average. (3 is NCSNv2's independence of the noise level.)
NCSN_LEVELS = {"model": dict(sigma_max=1.0, num_scales=10), "sampling": dict(n_steps_each=100, snr=0.316)}
CIFAR10_LEVELS = {"model.num_scales": 232, "sampling": dict(n_steps_each=5, snr=0.176)}
CELEBA_LEVELS = {"model.num_scales": 500, "sampling": dict(n_steps_each=5, snr=0.128)}

CELEBA = {"data": dict(dataset="CELEBA", image_size=64), "model.sigma_max": 90.0, "sampling.snr": 0.17}
# Large images from data.path, cropped and resized: LSUN, FFHQ, CelebA-HQ.
IMAGE_FOLDER = {
    "data": dict(dataset="folder", image_size=256, resize=True),
    "training": dict(batch_size=64, n_iters=2400001, snapshot_freq_for_preemption=5000),
    "model": dict(num_scales=2000, sigma_max=378.0, dropout=0.0),
    "sampling.snr": 0.075,
    # Both grow with the number of pixels, and nobody has published them at this size.
    "eval": dict(batch_size=32, enable_bpd=False, enable_asymmetry=False),
}
# After IMAGE_FOLDER: DDPM; NCSN++ (cont.), VE, with input and output pyramids of images; and, after that, 1024×1024.
DDPM_256 = {"model": dict(num_scales=1000, ch_mult=(1, 1, 2, 2, 4, 4)), "optim.lr": 2e-5}
NCSNPP_256 = {
    "model": dict(ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2),
    "model.progressive": "output_skip",
    "model.progressive_input": "input_skip",
}
NCSNPP_1024 = {
    "data.image_size": 1024,
    "training.batch_size": 8,
    "model": dict(sigma_max=1348.0, nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1, ema_rate=0.9999),
    "sampling.snr": 0.15,
    "eval.batch_size": 8,
}

# Chao et al. (ICML 2023), Section 5: one NCSN++ (deep) per data set of 32×32 colour images. QC has few images and many
# probes for the likelihood (Table 2), or the other way round for sampling (Tables 3 and 4). It continues the U model of
# step 600 000, ours or the authors' checkpoint.pth, to step 700 000. Of their evaluation: Asym from t = 0 on, and the
# tolerances of the ODE sampler.
QCSBM = {
    "model.num_res_blocks": 8,
    "training": dict(n_iters=700000, snapshot_freq=100000),
    "sampling": dict(rtol=5e-5, atol=1e-6),
    "eval.asym_first_level": 0,
}
QCSBM_MODELS = {
    "u": {},
    "c": {"model.parameterization": "conservative"},
    "qc": {"training": dict(qc_weight=1e-4, qc_probes=16, batch_size=8), "sampling.rtol": 1e-4},
    "qc_sampling": {"training": dict(qc_weight=1e-4, qc_probes=1), "sampling.rtol": 1e-4},
}
