"""U-NCSN++ along one, two or three axes, and an MLP for vectors, on arrays of yours, sized for a CPU (docs/arrays.md).

python main.py --config=configs/own_arrays.py:signal --config.data.path=FILE.npz --workdir=runs/ecg --mode=train

QC: --config.training.qc_weight=1e-3; C: --config.model.parameterization=conservative. Another shape: data.shape, whose
lengths are divisible by 4, the U-Net being of three resolutions.
"""

from configs.presets import preset

ARRAYS = {
    "data": dict(dataset="array", random_flip=False),
    "model": dict(nf=16, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0, ema_rate=0.99),
    "model.sigma_max": 10.0,  # the data have standard deviation 1
    "optim": dict(lr=1e-3, warmup=100),
    "training": dict(batch_size=32, n_iters=1500, eval_freq=300, snapshot_freq=500, snapshot_freq_for_preemption=100),
    "sampling": dict(num_steps=100, corrector="none"),
    "eval": dict(batch_size=50, num_samples=200, nll_images=100, asym_levels=20, asym_images=8),
}
PICTURES = {"data": dict(dataset="folder", uniform_dequantization=True), "eval.enable_sampling": False}
MODELS = {
    "signal": {"data.shape": (1, 128)},
    "complex": {"data.shape": (2, 32, 24)},
    "volume": {"data.shape": (1, 8, 16, 16)},
    "rgb48x64": PICTURES | {"data.shape": (3, 48, 64), "model.nf": 8},
    "vectors": {"data.shape": (2,), "model": dict(name="vector_mlp", nf=64, num_res_blocks=3, fourier_scale=1.0)},
}
get_config = preset(ARRAYS, variants=MODELS)
