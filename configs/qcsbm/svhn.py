"""U-, C- and QC-NCSN++ on SVHN (Chao et al., ICML 2023, Table 2).

python main.py --config=configs/qcsbm/svhn.py:u --workdir=runs/svhn/u --mode=train
python main.py --config=configs/qcsbm/svhn.py:qc --workdir=runs/svhn/qc --mode=train \
    --config.training.init_from=runs/svhn/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.00 / 0 / 0;  U 2.15 / 3.06e7 / 6.54e-4;  QC 2.01 / 1.69e7 / 4.80e-4.

QC continues the U model of step 600 000, ours or the authors' checkpoint.pth; the tables' models have 700 000 steps.
(The authors' config for this set counts from 300 000 to 450 000.)
`qc` is Table 2's setting (16 probes, batch 8), `qc_sampling` that of Tables 3 and 4 (1 probe, batch 128).
"""

from configs.presets import QCSBM_MODELS, qcsbm_config

MODELS = QCSBM_MODELS


def get_config(model="u"):
    return qcsbm_config("SVHN", model)
