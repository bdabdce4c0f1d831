"""U, C and QC on 8-Gaussian, checkerboard and spirals (Chao et al., ICML 2023, Section 3.2).

python -m 2d_examples.main --config=2d_examples/configs.py:gaussian_8-qc --workdir=runs/2d/qc --mode=train
python -m 2d_examples.main --config=2d_examples/configs.py:gaussian_8-qc --workdir=runs/2d/qc --mode=eval

The argument is DATASET-MODEL. The README has the expected numbers of all nine.
"""

from ml_collections import ConfigDict

DATASETS = {
    "gaussian_8": {"n_iters": 2000, "c_activation": "leaky_relu"},
    "checkerboard": {"n_iters": 4000, "c_activation": "elu"},
    "spiral_2": {"n_iters": 2000, "c_activation": "elu"},
}
MODELS = ("u", "c", "qc")


def get_config(name="gaussian_8-u"):
    dataset, _, model = name.rpartition("-")
    if dataset not in DATASETS or model not in MODELS:
        raise ValueError(
            f"config argument {name!r}: allowed is DATASET-MODEL with DATASET one of {', '.join(DATASETS)} and MODEL "
            f"one of {', '.join(MODELS)}"
        )
    setting = DATASETS[dataset]
    solver = {"solver": "rk45", "rtol": 1e-3, "atol": 1e-5}
    return ConfigDict(
        {
            "seed": 0,
            "data": {"dataset": dataset, "num_train": 50_000, "num_test": 5_000},
            "model": {
                "name": "mlp",
                "parameterization": "conservative" if model == "c" else "unconstrained",
                "widths": (64, 128, 256),
                "output_activation": setting["c_activation"] if model == "c" else "identity",
                "scale_by_sigma": True,
                "sigma_min": 0.1,
                "sigma_max": 3.0,
            },
            "training": {
                "sde": "vesde",
                "continuous": True,
                "batch_size": 5_000,
                "n_iters": setting["n_iters"],
                "likelihood_weighting": False,
                "reduce_mean": False,
                "qc_weight": 0.1 if model == "qc" else 0.0,
                "qc_estimator": "antisymmetric",  # one probe of which is exact in two dimensions
                "qc_probes": 1,
                "qc_interval": 1,
                "qc_stride": 2,  # the term on every second point of the batch; the paper: on all
                "qc_probe_chunk": 1,
                "log_freq": 100,
                "save_freq": 500,
            },
            # The paper's loss is twice ours, and its gradient clipped at 1.
            "optim": {"lr": 7.5e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "grad_clip": 0.5},
            "likelihood": {**solver, "divergence": "exact", "num_steps": 0},
            "sampling": {**solver, "method": "ode", "num_steps": 50, "noise_removal": False},
        }
    )
