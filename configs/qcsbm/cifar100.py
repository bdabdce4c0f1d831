"""U-, C- and QC-NCSN++ on CIFAR-100 (Chao et al., ICML 2023, Table 2).

python main.py --config=configs/qcsbm/cifar100.py:u --workdir=runs/cifar100/u --mode=train
python main.py --config=configs/qcsbm/cifar100.py:qc --workdir=runs/cifar100/qc --mode=train \
    --config.training.init_from=runs/cifar100/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.34 / 0 / 0;  U 3.50 / 2.98e8 / 2.25e-3;  QC 3.44 / 9.31e7 / 1.44e-3.

QC continues the U model of step 600 000, ours or the authors' checkpoint.pth; the tables' models have 700 000 steps.
`qc` is Table 2's setting (16 probes, batch 8), `qc_sampling` that of Tables 3 and 4 (1 probe, batch 128).
"""

from configs.presets import QCSBM_MODELS, qcsbm_config

MODELS = QCSBM_MODELS


def get_config(model="u"):
    return qcsbm_config("CIFAR100", model)
