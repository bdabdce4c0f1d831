"""U-, C- and QC-NCSN++ on scikit-learn's 8×8 digits: the whole pipeline on a laptop.

python main.py --config=configs/digits.py:u --workdir=runs/digits/u --mode=train
python main.py --config=configs/digits.py:u --workdir=runs/digits/u --mode=eval

`make demo` trains and evaluates all three; the expected numbers are in the README.
"""

from configs.defaults import base_config, choose

MODELS = {
    "u": {},
    "c": {"model.parameterization": "conservative"},
    "qc": {"training.qc_weight": 1e-3},
}


def get_config(model="u"):
    config = base_config()
    config.data.update(
        dataset="digits", image_size=8, num_channels=1, random_flip=False, uniform_dequantization=True
    )
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(4,), dropout=0.0, sigma_max=10.0)
    config.optim.update(lr=1e-3, warmup=200)
    config.training.update(n_iters=4000, eval_freq=250, snapshot_freq=1000, snapshot_freq_for_preemption=250)
    config.sampling.num_steps = 100
    config.eval.update(batch_size=360, num_samples=1437, asym_levels=20, asym_images=90, asym_probes=0)
    return choose(config, model, MODELS)
