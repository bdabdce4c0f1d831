"""U-, C- and QC-NCSN++ on CIFAR-100 (Chao et al., ICML 2023, Table 2).

python main.py --config=configs/qcsbm/cifar100.py:u --workdir=runs/cifar100/u --mode=train
python main.py --config=configs/qcsbm/cifar100.py:qc --workdir=runs/cifar100/qc --mode=train \
    --config.training.init_from=runs/cifar100/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.34 / 0 / 0;  U 3.50 / 2.98e8 / 2.25e-3;  QC 3.44 / 9.31e7 / 1.44e-3.
"""

from configs.presets import QCSBM, QCSBM_MODELS, preset

MODELS = QCSBM_MODELS
get_config = preset(QCSBM, {"data.dataset": "CIFAR100"}, variants=MODELS)
