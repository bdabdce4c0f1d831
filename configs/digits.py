"""U-, C- and QC-NCSN++ on scikit-learn's 8×8 digits: the whole pipeline on a laptop.

python main.py --config=configs/digits.py:u --workdir=runs/digits/u --mode=train
python main.py --config=configs/digits.py:u --workdir=runs/digits/u --mode=eval
python main.py --config=configs/digits.py:u --workdir=runs/digits/u --mode=train_classifier

`make demo` trains and evaluates all three. The expected numbers are in the README, the choice of qc_weight in
docs/choosing_qc_weight.md. Data are dequantised in training, too: with only 17 grey levels bits/dim
would suffer otherwise.
"""

from configs.presets import preset

DIGITS = {
    "data": dict(dataset="digits", image_size=8, num_channels=1, random_flip=False, uniform_dequantization=True),
    "model": dict(nf=16, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, sigma_max=10.0),
    # Without it every group norm forgets ‖x‖, which varies by 9 % in so few dimensions, and ODE samples are noise.
    "model.parameterization": "preconditioned",
    "optim": dict(lr=1e-3, warmup=200),
    "training": dict(batch_size=128, n_iters=2500, eval_freq=200, snapshot_freq=600, snapshot_freq_for_preemption=200),
    "classifier": dict(nf=32, ch_mult=(1, 2), num_res_blocks=1, n_iters=1500, lr=1e-3, save_freq=250),
    "sampling.num_steps": 100,
    "eval": dict(
        batch_size=360, num_samples=1000, features="classifier", asym_levels=20, asym_images=24, asym_probes=0
    ),
}
MODELS = {
    "u": {},
    "c": {"model.parameterization": "conservative", "training.n_iters": 800},
    "qc": {"training.qc_weight": 0.02},
    "conditional": {"model.num_classes": 10, "training.label_dropout": 0.2, "sampling.condition": "class_free"},
}
get_config = preset(DIGITS, variants=MODELS)
