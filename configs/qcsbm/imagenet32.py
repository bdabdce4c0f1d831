"""U-, C- and QC-NCSN++ on ImageNet-32×32 (Chao et al., ICML 2023, Tables 2 to 4).

python main.py --config=configs/qcsbm/imagenet32.py:u --workdir=runs/imagenet32/u --mode=train
python main.py --config=configs/qcsbm/imagenet32.py:qc --workdir=runs/imagenet32/qc --mode=train \
    --config.training.init_from=runs/imagenet32/u/checkpoints/step_00600000.pt

Table 2, NLL (bits/dim) / Asym / NAsym:  C 5.10 / 0 / 0;  U 3.96 / 2.05e7 / 7.17e-4;  QC 3.83 / 1.13e7 / 5.47e-4.
Table 3, FID / IS / precision / recall by PC sampling of 1000 steps:
  C 28.97 / 8.58 / 0.61 / 0.45;  U 19.82 / 9.89 / 0.60 / 0.52;  QC 19.62 / 9.94 / 0.61 / 0.52.

(The authors' config for this set has neither dropout nor flips: --config.model.dropout=0.0
--config.data.random_flip=False.)
"""

from configs.presets import QCSBM, QCSBM_MODELS, preset

MODELS = QCSBM_MODELS
get_config = preset(QCSBM, {"data.dataset": "IMAGENET32"}, variants=MODELS)
