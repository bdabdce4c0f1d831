"""U, C and QC on 8-Gaussian, checkerboard and spirals (Chao et al., ICML 2023, Section 3.2).

python -m 2d_examples.main --config=2d_examples/configs.py:gaussian_8-qc --workdir=runs/2d/qc --mode=train
python -m 2d_examples.main --config=2d_examples/configs.py:gaussian_8-qc --workdir=runs/2d/qc --mode=eval

The argument is DATASET-MODEL. The README has the expected numbers of all nine.
"""

from ml_collections import ConfigDict

from configs import defaults
from configs.fields import Field, check_fields, make_config, with_defaults
from configs.ranges import at_least, choices, fraction, positive, positive_integers

DATASETS = {
    "gaussian_8": {"n_iters": 2000, "c_activation": "leaky_relu"},
    "checkerboard": {"n_iters": 4000, "c_activation": "elu"},
    "spiral_2": {"n_iters": 2000, "c_activation": "elu"},
}
MODELS = ("u", "c", "qc")
ACTIVATIONS = choices("identity", "leaky_relu", "elu", or_path=True)

FIELDS = {
    **with_defaults(
        defaults.FIELDS,
        {
            "model": dict(parameterization="unconstrained", scale_by_sigma=True, sigma_min=0.1, sigma_max=3.0),
            "training": dict(sde="vesde", likelihood_weighting=False, reduce_mean=False, qc_weight=0.0, qc_probes=1),
            # One probe is exact in two dimensions. The term is on every second point of the batch; in the paper on all.
            "training.qc_estimator": "antisymmetric",
            "training.qc_interval": 1,
            "training.qc_stride": 2,
            "training.qc_probe_chunk": 1,
            "optim": dict(lr=7.5e-4, beta1=0.9, eps=1e-8),
            "likelihood": dict(divergence="exact", solver="rk45", rtol=1e-3, atol=1e-5, num_steps=0),
            "sampling": dict(solver="rk45", rtol=1e-3, atol=1e-5, noise_removal=False),
        },
    ),
    "seed": Field(0, "seed of all randomness", at_least(0, most=2**63 - 1)),
    "data.dataset": Field("gaussian_8", "the density", choices(*DATASETS)),
    "data.num_train": Field(50_000, "training points", at_least(1)),
    "data.num_test": Field(5_000, "test points, and samples", at_least(4)),
    "model.name": Field("mlp", "the network", choices("mlp")),
    "model.widths": Field((64, 128, 256), "of the layers of a point", positive_integers(least=1)),
    "model.output_activation": Field("identity", "on the output of the network", ACTIVATIONS),
    "training.continuous": Field(True, "continuous time", choices(True)),
    "training.batch_size": Field(5_000, "points of a step", at_least(1)),
    "training.n_iters": Field(2000, "steps in all", at_least(1)),
    "training.log_freq": Field(100, "steps between rows of the log", at_least(1)),
    "training.save_freq": Field(500, "steps between checkpoints", at_least(1)),
    "optim.beta2": Field(0.999, "decay of the mean square of the gradients", fraction),
    # The paper's loss is twice ours, and its gradient clipped at 1.
    "optim.grad_clip": Field(0.5, "largest norm of the gradient", positive),
    "sampling.method": Field("ode", "kind of sampler", choices("ode")),
    "sampling.num_steps": Field(50, "of heun and adams", at_least(1)),
}


def get_config(name="gaussian_8-u"):
    dataset, _, model = name.rpartition("-")
    if dataset not in DATASETS or model not in MODELS:
        known = f"DATASET one of {', '.join(DATASETS)} and MODEL one of {', '.join(MODELS)}"
        raise ValueError(f"config argument {name!r}: allowed is DATASET-MODEL with {known}")
    setting = DATASETS[dataset]
    overrides = {
        "u": {},
        "c": {"model": dict(parameterization="conservative", output_activation=setting["c_activation"])},
        "qc": {"training.qc_weight": 0.05},  # 0.1 in the paper's loss, which is twice ours
    }
    fixed = {"data.dataset": dataset, "training.n_iters": setting["n_iters"]}
    return make_config(FIELDS, fixed, overrides[model])


def check(config: ConfigDict) -> None:
    """Whether all fields are within their ranges, and go together.

    Raises:
        ValueError: the first that is not.
    """
    check_fields(config, FIELDS, "the 2-D examples, 2d_examples/configs.py")
    batch_size, stride = config.training.batch_size, config.training.qc_stride
    if batch_size > config.data.num_train:
        raise ValueError(f"training.batch_size={batch_size}: at most data.num_train={config.data.num_train}")
    if batch_size % stride:
        raise ValueError(f"training.qc_stride={stride}: must divide training.batch_size={batch_size}")
