"""U-, C- and QC-NCSN++ on CIFAR-10 (Chao et al., ICML 2023, Tables 2 and 3).

python main.py --config=configs/qcsbm/cifar10.py:u --workdir=runs/cifar10/u --mode=train
python main.py --config=configs/qcsbm/cifar10.py:qc --workdir=runs/cifar10/qc --mode=train \
    --config.training.init_from=runs/cifar10/u/checkpoints/step_00600000.pt

NLL (bits/dim) / Asym / NAsym: C 5.91 / 0 / 0, U 3.46 / 1.88e8 / 1.90e-3, QC 3.38 / 3.49e7 / 8.41e-4.
FID / IS by PC sampling: C 10.97 / 8.58, U 2.50 / 9.58, QC 2.48 / 9.70.
QC continues the U model of step 600 000; the tables' models have 700 000 steps. `qc` is Table 2's setting; Table 3's
has --config.training.qc_probes=1 --config.training.batch_size=128.
"""

from configs.defaults import base_config, choose

MODELS = {
    "u": {},
    "c": {"model.parameterization": "conservative"},
    "qc": {"training.qc_weight": 1e-4, "training.qc_probes": 16, "training.batch_size": 8},
}


def get_config(model="u"):
    config = base_config()
    config.model.num_res_blocks = 8
    config.training.n_iters = 700000
    config.training.snapshot_freq = 100000
    return choose(config, model, MODELS)
