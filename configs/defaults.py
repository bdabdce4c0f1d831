"""What every experiment shares: all fields of a config, with the values that suit most.

Presets override these; unknown fields are refused. Field names are score_sde_pytorch's wherever the concept exists
there. Times are in steps of the optimiser.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """All fields. Data and network are NCSN++ on CIFAR-10, the SDE is VE, the objective is denoising score matching."""
    config = ConfigDict()
    config.seed = 42
    config.label = ""  # name of the run in reports; empty: its folder

    config.data = ConfigDict()
    config.data.dataset = "CIFAR10"  # digits, npz, folder, MNIST, CIFAR10, CIFAR100, SVHN, IMAGENET32, CELEBA
    config.data.path = ""  # the .npz file or image folder of one's own
    config.data.root = "downloads"  # where published data sets live
    config.data.download = False  # fetch those of torchvision if they are not there
    config.data.image_size = 32
    config.data.num_channels = 3
    config.data.resize = False  # crop and resize images of another size, instead of refusing them
    config.data.centered = False  # images in [-1, 1] instead of [0, 1]
    config.data.random_flip = True
    config.data.uniform_dequantization = False  # in training; likelihood is always of dequantised data

    config.training = ConfigDict()
    config.training.sde = "vesde"  # vesde, vpsde, subvpsde
    config.training.continuous = True
    config.training.batch_size = 128  # over all processes
    config.training.n_iters = 1300001
    config.training.likelihood_weighting = False
    config.training.reduce_mean = False
    config.training.label_dropout = 0.0  # how often a class is withheld from a network with classes
    config.training.init_from = ""  # checkpoint or run to start from: weights, EMA, optimiser and step
    config.training.qc_weight = 0.0  # weight of the antisymmetric part of the Jacobian; > 0 makes a QC model
    config.training.qc_probes = 1
    config.training.qc_estimator = "antisymmetric"  # antisymmetric, trace, exact
    config.training.qc_interval = 1  # evaluate the term every so many steps
    config.training.qc_stride = 1  # and on every so many samples of the batch
    config.training.qc_probe_chunk = 1  # probes whose graphs are held in memory at once
    config.training.activation_checkpointing = False  # keep the blocks' inputs alone, and compute the rest twice
    config.training.log_freq = 50
    config.training.eval_freq = 1000
    config.training.snapshot_freq = 50000  # checkpoints at multiples of this are kept for ever; 0 keeps none
    config.training.snapshot_freq_for_preemption = 10000
    config.training.keep_checkpoints = 2
    config.training.snapshot_sampling = True  # a grid of samples at every snapshot

    config.optim = ConfigDict()
    config.optim.optimizer = "Adam"
    config.optim.lr = 2e-4
    config.optim.beta1 = 0.9
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.warmup = 5000
    config.optim.grad_clip = 1.0  # largest gradient norm; negative: no limit

    config.model = ConfigDict()
    config.model.name = "ncsnpp"
    config.model.parameterization = "unconstrained"  # unconstrained, conservative
    # VE: geometric, constant, square_root, polynomial; VP: linear, constant, power, exponential, cosine; "": the first
    config.model.schedule = ""
    config.model.sigma_min = 0.01
    config.model.sigma_max = 50.0
    config.model.beta_min = 0.1
    config.model.beta_max = 20.0  # of cosine: where β is cut off; 999 in the source
    config.model.rho = 2.0  # exponent of polynomial and power
    config.model.num_scales = 1000  # noise levels of a discrete model; steps of the samplers
    config.model.ema_rate = 0.999
    config.model.nf = 128
    config.model.ch_mult = (1, 2, 2, 2)
    config.model.num_res_blocks = 4
    config.model.attn_resolutions = (16,)
    config.model.dropout = 0.1
    config.model.nonlinearity = "swish"
    config.model.conditional = True
    config.model.scale_by_sigma = True
    config.model.embedding_type = "fourier"
    config.model.fourier_scale = 16.0
    config.model.resblock_type = "biggan"
    config.model.resamp_with_conv = True
    config.model.fir = True
    config.model.fir_kernel = (1, 3, 3, 1)
    config.model.skip_rescale = True
    config.model.progressive = "none"
    config.model.progressive_input = "residual"
    config.model.progressive_combine = "sum"
    config.model.init_scale = 0.0
    config.model.num_classes = 0  # of the data set, for a network that is given the class; 0: it is not

    config.sampling = ConfigDict()
    config.sampling.method = "pc"  # pc, ode, few_step
    config.sampling.num_steps = 0  # 0: model.num_scales
    config.sampling.noise_removal = True
    # euler_maruyama, reverse_diffusion, ancestral_sampling, exponential_integrator, probability_flow, none
    config.sampling.predictor = "reverse_diffusion"
    config.sampling.corrector = "langevin"
    config.sampling.n_steps_each = 1
    config.sampling.snr = 0.16
    # of ode: rk45, scipy, dopri5, heun, adams; of few_step: heun, dpmpp_2m, dpmpp_2m_sde
    config.sampling.solver = "rk45"
    config.sampling.rtol = 1e-5
    config.sampling.atol = 1e-5
    # What is given: inpaint, colorize, super_resolution, ct, linear (of the first test images); class, class_free
    config.sampling.condition = ""
    config.sampling.conditioning = "projection"  # on a measurement: projection, dps, pigdm
    config.sampling.guidance_weight = 1.0  # of class, class_free and pigdm; the step size of dps
    config.sampling.class_label = -1  # -1: every class in turn
    # Unknown to inpaint: left, right, top, bottom, center; "top,left,height,width"; an image file, white where unknown
    config.sampling.mask = "bottom"
    config.sampling.factor = 2  # of super_resolution
    config.sampling.num_views = 23  # of ct
    config.sampling.operator = ""  # of linear: a .npy file with a matrix
    config.sampling.measurement_noise = 0.0  # standard deviation, in the units of the images as the model sees them
    config.sampling.num_images = 8  # that are measured
    config.sampling.samples_per_image = 4

    # The classifier of noised images for sampling.condition=class: --mode=train_classifier
    config.classifier = ConfigDict()
    config.classifier.nf = 64
    config.classifier.ch_mult = (1, 2, 2, 2)
    config.classifier.num_res_blocks = 2
    config.classifier.dropout = 0.1
    config.classifier.batch_size = 128
    config.classifier.n_iters = 50000
    config.classifier.lr = 3e-4
    config.classifier.weight_decay = 0.05
    config.classifier.log_freq = 100
    config.classifier.save_freq = 2000

    config.likelihood = ConfigDict()
    config.likelihood.divergence = "rademacher"  # rademacher, gaussian, exact
    config.likelihood.probes = 1  # of rademacher and gaussian; their variance falls as 1/probes
    config.likelihood.time = "log_ratio"  # what to integrate over: log_ratio (of noise to signal), t
    config.likelihood.solver = "adams"  # rk45, scipy, dopri5, heun, adams
    config.likelihood.num_steps = 160  # of heun and adams
    config.likelihood.rtol = 1e-3
    config.likelihood.atol = 1e-5

    config.eval = ConfigDict()
    config.eval.batch_size = 128
    config.eval.enable_bpd = True
    config.eval.enable_asymmetry = True
    config.eval.enable_sampling = True
    config.eval.num_samples = 50000
    # FID and its relatives: inception, or classifier, trained on the set's own labels; such numbers compare only with
    # each other
    config.eval.features = "inception"
    config.eval.inception_path = ""  # torch-fidelity's weights; empty: torch's cache, fetched into there if need be
    config.eval.inception_sha256 = ""  # of weights other than the published ones
    config.eval.num_reference = 50000  # training images, evenly spaced, to compare samples with; 0: all
    config.eval.stats_path = ""  # .npz with pool_3 of the data, instead of computing it
    config.eval.backend = "torch"  # of FID, KID and IS: torch, tfgan
    config.eval.tfhub_inception = ""  # with tfgan: the folder of TF-Hub's Inception, to take the features from
    config.eval.nll_images = 0  # test images for bits/dim, spread over the set; 0: all
    config.eval.asym_levels = 100  # noise levels t = i/levels
    config.eval.asym_images = 0  # test images per level; 0: all
    config.eval.asym_probes = 16  # 0: the exact Jacobian
    return config


def use_vp(config: ConfigDict, sde: str = "vpsde") -> ConfigDict:
    """DDPM++ on VP or sub-VP: centred data, positional embedding, no input pyramid (Song et al., 2021, Appendix H)."""
    config.training.sde = sde
    config.training.reduce_mean = True
    config.data.centered = True
    config.model.ema_rate = 0.9999
    config.model.scale_by_sigma = False
    config.model.embedding_type = "positional"
    config.model.fir = False
    config.model.progressive_input = "none"
    config.sampling.predictor = "euler_maruyama"
    config.sampling.corrector = "none"
    return config


def choose(config: ConfigDict, name: str, variants: dict[str, dict]) -> ConfigDict:
    """Apply the overrides of one of a file's variants, the argument after the colon in ``--config=FILE:NAME``.

    Raises:
        ValueError: there is no such variant.
    """
    if name not in variants:
        raise ValueError(f"config argument {name!r}: allowed are {', '.join(variants)}")
    config.update_from_flattened_dict(variants[name])
    return config
