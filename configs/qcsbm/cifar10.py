"""U-, C- and QC-NCSN++ on CIFAR-10 (Chao et al., ICML 2023, Tables 2 to 4).

python main.py --config=configs/qcsbm/cifar10.py:u --workdir=runs/cifar10/u --mode=train
python main.py --config=configs/qcsbm/cifar10.py:qc --workdir=runs/cifar10/qc --mode=train \
    --config.training.init_from=runs/cifar10/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.91 / 0 / 0;  U 3.46 / 1.88e8 / 1.90e-3;  QC 3.38 / 3.49e7 / 8.41e-4.
Table 3, FID / IS / precision / recall by PC sampling of 1000 steps:
  C 10.97 / 8.58 / 0.61 / 0.58;  U 2.50 / 9.58 / 0.67 / 0.60;  QC 2.48 / 9.70 / 0.67 / 0.60.

QC continues the U model of step 600 000, ours or the authors' checkpoint.pth; the tables' models have 700 000 steps.
`qc` is Table 2's setting (16 probes, batch 8), `qc_sampling` that of Tables 3 and 4 (1 probe, batch 128).
"""

from configs.presets import QCSBM_MODELS, qcsbm_config

MODELS = QCSBM_MODELS


def get_config(model="u"):
    return qcsbm_config("CIFAR10", model)
