"""U-, C- and QC-NCSN++ on SVHN (Chao et al., ICML 2023, Table 2).

python main.py --config=configs/qcsbm/svhn.py:u --workdir=runs/svhn/u --mode=train
python main.py --config=configs/qcsbm/svhn.py:qc --workdir=runs/svhn/qc --mode=train \
    --config.training.init_from=runs/svhn/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.00 / 0 / 0;  U 2.15 / 3.06e7 / 6.54e-4;  QC 2.01 / 1.69e7 / 4.80e-4.

(The authors' config for this set counts from 300 000 to 450 000. They draw as many samples as there are test images.)
"""

from configs.presets import QCSBM, QCSBM_MODELS, preset

MODELS = QCSBM_MODELS
get_config = preset(QCSBM, {"data.dataset": "SVHN", "eval.num_samples": 26032}, variants=MODELS)
