"""The fields of image models.

Names are score_sde_pytorch's wherever the concept exists there. Config files override defaults; unknown fields are
refused. Times are in steps of the optimiser.
"""

from ml_collections import ConfigDict

from configs.fields import Field, Overrides, make_config
from configs.ranges import Range, at_least, choices, fraction, import_paths, not_negative, positive, positive_integers

IMAGE_SETS = ("digits", "npz", "folder", "MNIST", "CIFAR10", "CIFAR100", "SVHN", "IMAGENET32", "CELEBA")
NETWORKS = ("ddpm", "ncsn", "ncsnpp", "ncsnv2", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256", "vector_mlp")
PARAMETERIZATIONS = ("unconstrained", "conservative", "preconditioned")
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "exponential_integrator")
PREDICTORS += ("probability_flow", "none")
ODE_SOLVERS = ("rk45", "heun", "adams")
VE_SCHEDULES = ("geometric", "constant", "square_root", "polynomial")
VP_SCHEDULES = ("linear", "constant", "power", "exponential", "cosine")
PREDICTIONS = ("scaled_score", "score", "epsilon", "sample", "v_prediction", "velocity", "velocity_to_data")
MEASUREMENTS = ("inpaint", "colorize", "super_resolution", "ct", "linear")

_SEEDS = Range("integers of 64 bits", lambda value: -(2**63) <= value < 2**63)
_STEPS, _STEPS_OR_0 = at_least(1, most=10**9), at_least(0, most=10**9)
_CLASSES = at_least(0, most=100_000)
_GRAD_CLIPS = Range(f"{positive.text}, or -1 for no limit", lambda value: value == -1 or positive.contains(value))
_REFERENCES = Range("0 for all, or 4 to 1,000,000", lambda value: value == 0 or 4 <= value <= 10**6)
_LEVELS = Range("0, or 2 to 65,536", lambda value: value == 0 or 2 <= value <= 2**16)
_SHAPES = positive_integers(least=0, most=2**24)
_SCHEDULES = choices("", *dict.fromkeys(VE_SCHEDULES + VP_SCHEDULES), or_path=True)
_SOLVERS = choices(*ODE_SOLVERS, "dpmpp_2m", "dpmpp_2m_sde", or_path=True)

# Data and network are NCSN++ on CIFAR-10, the SDE is VE, the objective is denoising score matching.
FIELDS: dict[str, Field] = {
    "seed": Field(42, "seed of all randomness", _SEEDS),
    "label": Field("", "name of the run in reports; empty: its folder"),
    "data.dataset": Field("CIFAR10", "the data set", choices("array", *IMAGE_SETS, or_path=True, any_case=True)),
    "data.path": Field("", "the file or folder of npz, folder or array"),
    "data.shape": Field(
        (), "of an item, channels first: C,H,W; C,L; C,D,H,W; D; or (): that of square images", _SHAPES
    ),
    "data.root": Field("downloads", "folder of published data sets"),
    "data.download": Field(False, "fetch those of torchvision if they are not there"),
    "data.image_size": Field(32, "height and width in pixels", at_least(1, most=2**13)),
    "data.num_channels": Field(3, "1 for grey, 3 for colour", at_least(1, most=2**13)),
    "data.num_levels": Field(
        0, "of integers in array, 16-bit images in folder; 0: as many as their bits have", _LEVELS
    ),
    "data.normalization": Field(
        "standard",
        "of floating-point data: mean 0 and standard deviation 1, or [-1, 1], of each channel; or none",
        choices("standard", "range", "none"),
    ),
    "data.resize": Field(False, "crop and resize images of another size, instead of refusing them"),
    "data.background": Field("white", "colour under transparent pixels of image files, such as black or #808080"),
    "data.centered": Field(False, "levels in [-1, 1] instead of [0, 1]"),
    "data.random_flip": Field(True, "flip training images at random"),
    "data.uniform_dequantization": Field(False, "in training; likelihood is always of dequantised data"),
    "training.sde": Field("vesde", "the forward process", choices("flow", "subvpsde", "vesde", "vpsde", or_path=True)),
    "training.continuous": Field(True, "continuous time, instead of model.num_scales noise levels"),
    "training.batch_size": Field(128, "images of a step, over all processes", at_least(1)),
    "training.n_iters": Field(1300001, "steps in all", _STEPS),
    "training.likelihood_weighting": Field(False, "weight g² instead of σ² in the loss"),
    "training.reduce_mean": Field(False, "mean over dimensions in the loss, instead of the sum or half of it"),
    "training.label_dropout": Field(0.0, "how often a class is withheld from a network with classes", fraction),
    "training.init_from": Field("", "checkpoint or run to start from: weights, EMA, optimiser and step"),
    "training.qc_weight": Field(0.0, "weight λ of the quasi-conservative term; > 0 makes a QC model", not_negative),
    "training.qc_probes": Field(1, "random directions that the term is estimated with", at_least(1)),
    "training.qc_estimator": Field("antisymmetric", "of the term", choices("antisymmetric", "trace", "exact")),
    "training.qc_interval": Field(1, "evaluate the term every so many steps", at_least(1)),
    "training.qc_stride": Field(1, "and on every so many samples of the batch", at_least(1)),
    "training.qc_probe_chunk": Field(1, "probes whose graphs are held in memory at once", at_least(1)),
    "training.activation_checkpointing": Field(False, "keep only the inputs of blocks, and compute the rest twice"),
    "training.log_freq": Field(50, "steps between rows of the log", _STEPS),
    "training.eval_freq": Field(1000, "steps between test losses", _STEPS),
    "training.snapshot_freq": Field(50000, "keep checkpoints at multiples of this for ever; 0: none", _STEPS_OR_0),
    "training.snapshot_freq_for_preemption": Field(10000, "steps between checkpoints", _STEPS),
    "training.keep_checkpoints": Field(2, "how many of the newest checkpoints to keep", at_least(1)),
    "training.snapshot_sampling": Field(True, "draw a grid of samples at every snapshot"),
    "optim.optimizer": Field("Adam", "the optimiser", choices("Adam")),
    "optim.lr": Field(2e-4, "learning rate", positive),
    "optim.beta1": Field(0.9, "decay of the mean of the gradients", fraction),
    "optim.eps": Field(1e-8, "added to the root of the mean square of the gradients", positive),
    "optim.weight_decay": Field(0.0, "factor of the weights that is added to their gradients", not_negative),
    "optim.warmup": Field(5000, "steps over which the learning rate rises", _STEPS_OR_0),
    "optim.grad_clip": Field(1.0, "largest norm of the gradient", _GRAD_CLIPS),
    "model.name": Field("ncsnpp", "the network; ncsnpp is also DDPM++", choices(*NETWORKS, or_path=True)),
    "model.parameterization": Field("unconstrained", "of the score", choices(*PARAMETERIZATIONS)),
    "model.schedule": Field("", "noise over time; empty: geometric for VE, linear for VP and sub-VP", _SCHEDULES),
    "model.sigma_min": Field(0.01, "VE: σ at t = 0", positive),
    "model.sigma_max": Field(50.0, "VE: σ at t = 1", positive),
    "model.beta_min": Field(0.1, "VP: β at t = 0", not_negative),
    "model.beta_max": Field(20.0, "VP: β at t = 1; of cosine: where β is cut off, 999 in the source", positive),
    "model.rho": Field(2.0, "exponent of polynomial and power", positive),
    "model.num_scales": Field(1000, "noise levels of a discrete model; steps of the samplers", at_least(1)),
    "model.ema_rate": Field(0.999, "decay of the moving average of the weights", fraction),
    "model.nf": Field(128, "base number of channels", at_least(1, most=2**13)),
    "model.ch_mult": Field((1, 2, 2, 2), "channels of each level, in multiples of nf", positive_integers(least=1)),
    "model.num_res_blocks": Field(4, "residual blocks per level", at_least(1, most=100)),
    "model.attn_resolutions": Field((16,), "resolutions that get self-attention", positive_integers(least=0)),
    "model.dropout": Field(0.1, "probability, in every residual block", fraction),
    "model.nonlinearity": Field("swish", "activation", choices("elu", "relu", "lrelu", "swish", or_path=True)),
    "model.conditional": Field(True, "give the noise level to the blocks"),
    "model.scale_by_sigma": Field(True, "VE: divide the network by σ"),
    "model.prediction": Field("", "what the network predicts; empty: what its family does", choices("", *PREDICTIONS)),
    "model.embedding_type": Field("fourier", "embedding of the noise level", choices("fourier", "positional")),
    "model.fourier_scale": Field(16.0, "standard deviation of the Fourier frequencies", positive),
    "model.resblock_type": Field("biggan", "kind of residual block", choices("ddpm", "biggan")),
    "model.resamp_with_conv": Field(True, "learned convolution in resampling of the ddpm kind"),
    "model.fir": Field(True, "blur when resampling"),
    "model.fir_kernel": Field((1, 3, 3, 1), "taps of the blur", positive_integers(least=2)),
    "model.skip_rescale": Field(True, "divide sums of branches by √2"),
    "model.progressive": Field("none", "output pyramid", choices("none", "output_skip", "residual")),
    "model.progressive_input": Field("residual", "input pyramid", choices("none", "input_skip", "residual")),
    "model.progressive_combine": Field("sum", "how input_skip is merged", choices("sum", "cat")),
    "model.init_scale": Field(0.0, "initial scale of the last layer of every branch", not_negative),
    "model.num_classes": Field(0, "of the data set, for a network that is given the class; 0: it is not", _CLASSES),
    "sampling.method": Field("pc", "kind of sampler", choices("pc", "ode", "few_step", or_path=True)),
    "sampling.num_samples": Field(64, "samples of --mode=sample, without a measurement", at_least(1)),
    "sampling.num_steps": Field(0, "steps; 0: model.num_scales", at_least(0)),
    "sampling.noise_removal": Field(True, "remove the noise that is left, by Tweedie's formula"),
    "sampling.predictor": Field("reverse_diffusion", "of pc", choices(*PREDICTORS, or_path=True)),
    "sampling.corrector": Field("langevin", "of pc", choices("langevin", "ald", "none", or_path=True)),
    "sampling.n_steps_each": Field(1, "steps of the corrector at each time", at_least(1)),
    "sampling.snr": Field(0.16, "signal-to-noise ratio of the corrector's steps", positive),
    "sampling.solver": Field("rk45", "of ode: rk45, heun, adams; of few_step: heun, dpmpp_2m, dpmpp_2m_sde", _SOLVERS),
    "sampling.rtol": Field(1e-5, "relative tolerance of ode", positive),
    "sampling.atol": Field(1e-5, "absolute tolerance of ode", positive),
    "sampling.condition": Field(
        "",
        "what is given: a measurement of the first test images, or a class",
        choices("", *MEASUREMENTS, "class", "class_free", or_path=True),
    ),
    "sampling.conditioning": Field("projection", "on a measurement", choices("projection", "dps", "pigdm")),
    "sampling.guidance_weight": Field(1.0, "of class, class_free and pigdm; the step size of dps", not_negative),
    "sampling.class_label": Field(-1, "the class; -1: every class in turn", at_least(-1)),
    "sampling.mask": Field(
        "bottom",
        "unknown to inpaint: left, right, top, bottom, center; top,left,height,width; an image, white where unknown",
    ),
    "sampling.factor": Field(2, "of super_resolution", at_least(2)),
    "sampling.num_views": Field(23, "of ct", at_least(1, most=1000)),
    "sampling.conditions_path": Field(
        "", "of a network that takes conditions: a file with them, in place of those of the test set"
    ),
    "sampling.operator": Field("", "of linear: a .npy file with a matrix"),
    "sampling.measurement_noise": Field(0.0, "standard deviation, in units of the network's images", not_negative),
    "sampling.num_images": Field(8, "images that are measured", at_least(1)),
    "sampling.samples_per_image": Field(4, "samples for each of them", at_least(1)),
    # The classifier of noised images for sampling.condition=class: --mode=train_classifier.
    "classifier.nf": Field(64, "base number of channels", at_least(1, most=2**13)),
    "classifier.ch_mult": Field((1, 2, 2, 2), "channels of each level, in multiples of nf", positive_integers(least=1)),
    "classifier.num_res_blocks": Field(2, "residual blocks per level", at_least(1, most=100)),
    "classifier.dropout": Field(0.1, "probability, in every residual block", fraction),
    "classifier.batch_size": Field(128, "images of a step", at_least(1)),
    "classifier.n_iters": Field(50000, "steps in all", _STEPS),
    "classifier.lr": Field(3e-4, "learning rate", positive),
    "classifier.weight_decay": Field(0.05, "of AdamW", not_negative),
    "classifier.log_freq": Field(100, "steps between rows of the log", _STEPS),
    "classifier.save_freq": Field(2000, "steps between checkpoints", _STEPS),
    "likelihood.divergence": Field("rademacher", "its probes, or exact", choices("rademacher", "gaussian", "exact")),
    "likelihood.probes": Field(1, "of rademacher and gaussian; their variance falls as 1/probes", at_least(1)),
    "likelihood.time": Field("log_ratio", "integrate over log_ratio (noise to signal) or t", choices("t", "log_ratio")),
    "likelihood.solver": Field("adams", "of the probability-flow ODE", choices(*ODE_SOLVERS, or_path=True)),
    "likelihood.num_steps": Field(160, "of heun and adams", at_least(0)),
    "likelihood.rtol": Field(1e-3, "relative tolerance of rk45", positive),
    "likelihood.atol": Field(1e-5, "absolute tolerance of rk45", positive),
    "eval.batch_size": Field(128, "images at once, in each process", at_least(1)),
    "eval.enable_bpd": Field(True, "measure bits/dim"),
    "eval.enable_asymmetry": Field(True, "measure Asym and NAsym"),
    "eval.enable_sampling": Field(True, "measure the quality of samples"),
    "eval.num_samples": Field(50000, "samples to draw", at_least(1)),
    "eval.features": Field(
        "inception",
        "of FID and its relatives; classifier is trained on the set's own labels, and compares only with itself",
        choices("inception", "classifier", or_path=True),
    ),
    "eval.inception_path": Field("", "torch-fidelity's weights; empty: torch's cache, fetched into there if need be"),
    "eval.inception_sha256": Field("", "of weights other than the published ones"),
    "eval.num_reference": Field(50000, "training images, evenly spaced, to compare samples with; 0: all", _REFERENCES),
    "eval.stats_path": Field("", ".npz with pool_3 of the data, instead of computing it"),
    "eval.backend": Field("torch", "what computes FID, KID and IS", choices("torch", "tfgan", or_path=True)),
    "eval.tfhub_inception": Field("", "with tfgan: the folder of TF-Hub's Inception, to take the features from"),
    "eval.metrics": Field((), "further metrics of samples, module:attribute each", import_paths),
    "eval.nll_images": Field(0, "test images for bits/dim, evenly spaced; 0: all", at_least(0)),
    "eval.asym_levels": Field(100, "noise levels t = i/levels", at_least(1, most=10**4)),
    "eval.asym_first_level": Field(1, "their first i: 1 to levels, or as QCSBM's code 0 to levels − 1", choices(0, 1)),
    "eval.asym_images": Field(0, "test images per level; 0: all", at_least(0)),
    "eval.asym_probes": Field(16, "random directions; 0: the exact Jacobian", at_least(0)),
}


def base_config(*overrides: Overrides) -> ConfigDict:
    """All fields with their defaults, then ``overrides``, in which None deletes a field."""
    return make_config(FIELDS, *overrides)
