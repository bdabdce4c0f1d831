"""What experiments of one paper share, beyond ``configs.defaults``: fields for one data set, network or model family.

Facts are those of the papers' public configs, score_sde_pytorch's and QCSBM's.
"""

from ml_collections import ConfigDict

from configs.defaults import base_config, choose, use_vp

# Tables 2 to 4 of Chao et al. (ICML 2023): one NCSN++ (deep) per data set, QC with few images and many probes for the
# likelihood (Table 2), or the other way round for sampling (Tables 3 and 4).
QCSBM_MODELS = {
    "u": {},
    "c": {"model.parameterization": "conservative"},
    "qc": {"training.qc_weight": 1e-4, "training.qc_probes": 16, "training.batch_size": 8},
    "qc_sampling": {"training.qc_weight": 1e-4, "training.qc_probes": 1},
}


def qcsbm_config(dataset: str, model: str) -> ConfigDict:
    """A model of Chao et al. (2023), Section 5, on one of their data sets of 32×32 colour images."""
    config = base_config()
    config.data.dataset = dataset
    config.model.num_res_blocks = 8
    config.training.n_iters = 700000
    config.training.snapshot_freq = 100000
    return choose(config, model, QCSBM_MODELS)


# What NCSN++ and DDPM++ can be told and DDPM cannot.
NCSNPP_FIELDS = ("embedding_type", "fourier_scale", "resblock_type", "fir", "fir_kernel", "skip_rescale")
NCSNPP_FIELDS += ("progressive", "progressive_input", "progressive_combine", "init_scale")
# And what all U-Nets can be told and NCSN and NCSNv2 cannot.
UNET_FIELDS = ("ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "conditional", "resamp_with_conv")


def use_ddpm(config: ConfigDict) -> ConfigDict:
    """The network of Ho et al. (2020) in place of NCSN++ or DDPM++, and only the fields that it reads."""
    for field in NCSNPP_FIELDS:
        del config.model[field]
    config.model.update(name="ddpm", num_res_blocks=2)
    return config


def ddpm_256() -> ConfigDict:
    """DDPM on 256×256 images, VP in discrete time."""
    config = use_ddpm(use_discrete_vp(use_image_folder(base_config())))
    config.model.update(num_scales=1000, ch_mult=(1, 1, 2, 2, 4, 4))
    config.optim.lr = 2e-5
    return config


def use_discrete_vp(config: ConfigDict) -> ConfigDict:
    """VP in discrete time, sampled as DDPM is."""
    use_vp(config).training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config


def use_ncsn(config: ConfigDict, name: str = "ncsn") -> ConfigDict:
    """NCSN or NCSNv2 with only the fields that they read; SMLD, sampled by annealed Langevin dynamics alone."""
    for field in (*NCSNPP_FIELDS, *UNET_FIELDS):
        del config.model[field]
    config.training.continuous = False
    config.model.update(name=name, nonlinearity="elu", scale_by_sigma=name != "ncsn")
    config.optim.update(lr=1e-3 if name == "ncsn" else 1e-4, warmup=0, grad_clip=-1.0)
    config.sampling.update(predictor="none", corrector="ald")
    return config


# Song and Ermon (NeurIPS 2020) improve NCSN by five techniques: 1, 2 and 4 are more, and more widely spread, noise
# levels with as many Langevin steps in all; 5 is the moving average. (3 is NCSNv2's independence of the noise level.)
NCSN_LEVELS = {"model.sigma_max": 1.0, "model.num_scales": 10, "sampling.n_steps_each": 100, "sampling.snr": 0.316}
CIFAR10_LEVELS = {"model.num_scales": 232, "sampling.n_steps_each": 5, "sampling.snr": 0.176}
CELEBA_LEVELS = {"model.num_scales": 500, "sampling.n_steps_each": 5, "sampling.snr": 0.128}


def ncsn_config(levels: dict[str, float], *, celeba: bool = False, moving_average: bool = False) -> ConfigDict:
    """NCSN with some of the techniques of NCSNv2."""
    config = use_ncsn(use_celeba(base_config()) if celeba else base_config())
    config.model.ema_rate = 0.999 if moving_average else 0.0
    config.update_from_flattened_dict(levels)
    return config


def use_smld(config: ConfigDict) -> ConfigDict:
    """VE in discrete time: the network is told the index of the noise level."""
    config.training.continuous = False
    config.model.embedding_type = "positional"
    return config


def use_celeba(config: ConfigDict) -> ConfigDict:
    """CelebA at 64×64."""
    config.data.update(dataset="CELEBA", image_size=64)
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    return config


def use_image_folder(config: ConfigDict, image_size: int = 256) -> ConfigDict:
    """Large images from ``data.path``, cropped and resized: LSUN, FFHQ, CelebA-HQ."""
    config.data.update(dataset="folder", image_size=image_size, resize=True)
    config.training.update(batch_size=64, n_iters=2400001, snapshot_freq_for_preemption=5000)
    config.model.update(num_scales=2000, sigma_max=378.0, dropout=0.0)
    config.sampling.snr = 0.075
    # Both grow with the number of pixels, and nobody has published them at this size.
    config.eval.update(batch_size=32, enable_bpd=False, enable_asymmetry=False)
    return config


def ncsnpp_256(sigma_max: float) -> ConfigDict:
    """NCSN++ (cont.) on 256×256 images, VE: input and output pyramids of images."""
    config = use_image_folder(base_config())
    config.model.update(
        sigma_max=sigma_max,
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        progressive="output_skip",
        progressive_input="input_skip",
    )
    return config


def ncsnpp_1024() -> ConfigDict:
    """NCSN++ (cont.) on 1024×1024 images, VE."""
    config = ncsnpp_256(sigma_max=1348.0)
    config.data.image_size = 1024
    config.training.batch_size = 8
    config.model.update(nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1, ema_rate=0.9999)
    config.sampling.snr = 0.15
    config.eval.batch_size = 8
    return config


def use_ncsnpp_on_vp(config: ConfigDict) -> ConfigDict:
    """The network of NCSN++, still with a positional embedding, where ``use_vp`` has chosen that of DDPM++."""
    config.model.update(fir=True, progressive_input="residual")
    return config
