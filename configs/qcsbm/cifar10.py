"""U-, C- and QC-NCSN++ on CIFAR-10 (Chao et al., ICML 2023, Tables 2 to 4).

python main.py --config=configs/qcsbm/cifar10.py:u --workdir=runs/cifar10/u --mode=train
python main.py --config=configs/qcsbm/cifar10.py:qc --workdir=runs/cifar10/qc --mode=train \
    --config.training.init_from=runs/cifar10/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.91 / 0 / 0;  U 3.46 / 1.88e8 / 1.90e-3;  QC 3.38 / 3.49e7 / 8.41e-4.
Table 3, FID / IS / precision / recall by PC sampling of 1000 steps:
  C 10.97 / 8.58 / 0.61 / 0.58;  U 2.50 / 9.58 / 0.67 / 0.60;  QC 2.48 / 9.70 / 0.67 / 0.60.
"""

from configs.presets import QCSBM, QCSBM_MODELS, preset

MODELS = QCSBM_MODELS
get_config = preset(QCSBM, {"data.dataset": "CIFAR10"}, variants=MODELS)
