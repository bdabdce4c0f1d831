"""U- and QC-NCSN++ on an .npz of yours, sized for a CPU: 32×32 colour (rgb32) or 28×28 grey images (grey28).

python main.py --config=configs/own_images.py:rgb32_u --config.data.path=FILE.npz --workdir=runs/own/u --mode=train
python main.py --config=configs/own_images.py:rgb32_qc --config.data.path=FILE.npz --workdir=runs/own/qc --mode=train \
    --config.training.init_from=runs/own/u/checkpoints/step_00001200.pt

U's test loss (dsm) was 126.7 after 1500 steps on 5085 images of CIFAR-10, 17.3 on 17 435 of MNIST. qc_weight is chosen
as in docs/choosing_qc_weight.md: over steps 1251 to 1300, 5e-4 costs 0.1 and 0.2 % of dsm, 2e-3 costs 1.3 and 1.5 %.
Images of another size S, divisible by 4, the network being of three resolutions: --config.data.image_size=S and, with
S/4, --config.model.attn_resolutions.
"""

from configs.presets import preset

OWN = {
    "data.dataset": "npz",
    # The average must forget within the 300 steps of QC where it came from.
    "model": dict(nf=16, ch_mult=(1, 2, 2), num_res_blocks=1, dropout=0.0, ema_rate=0.99),
    "optim": dict(lr=1e-3, warmup=200),
    "training": dict(batch_size=32, n_iters=1500, eval_freq=300, snapshot_freq=300, snapshot_freq_for_preemption=100),
    "training.snapshot_sampling": False,
    "sampling.num_steps": 100,
    "eval": dict(batch_size=50, features="classifier", num_samples=200, nll_images=100, asym_levels=20, asym_images=8),
}
IMAGES = {
    "rgb32": {"model.attn_resolutions": (8,)},
    "grey28": {
        "data": dict(image_size=28, num_channels=1, random_flip=False),
        "model": dict(attn_resolutions=(7,), sigma_max=20.0),
    },
}
QC = {"training.qc_weight": 5e-4, "training.qc_stride": 4}
MODELS = {f"{name}_{model}": IMAGES[name] | {"u": {}, "qc": QC}[model] for name in IMAGES for model in ("u", "qc")}
get_config = preset(OWN, variants=MODELS)
