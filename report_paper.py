"""What the paper reports: Tables 2 and 3 of Chao, Sun, Cheng and Lee (ICML 2023, arXiv 2209.12753)."""

from __future__ import annotations

__all__ = ["PAPER", "PAPER_SOURCE"]

PAPER_SOURCE = (
    "Chao, Sun, Cheng and Lee, ICML 2023, arXiv 2209.12753. NLL, Asym and NAsym: Table 2 (QC: λ = 1e-4, K = 16 probes, "
    "batch 8). FID, IS, precision and recall: Table 3 (QC: λ = 1e-4, K = 1, batch 128; Inception features, 50 000 "
    "samples of the PC sampler). QC continues U from iteration 600 000 and is evaluated at 700 000. The paper counts "
    "predictor steps as NFE; the NFE of our runs are network evaluations."
)

_TABLE_2 = ("nll_bits_per_dim", "asym", "nasym")
_TABLE_3 = ("fid", "inception_score", "precision", "recall", "nfe_sampling")


def _paper_row(table_2: tuple[float, ...], table_3: tuple[float, ...] = ()) -> dict[str, float]:
    row = dict(zip(_TABLE_2, table_2, strict=True))
    return row | (dict(zip(_TABLE_3, (*table_3, 1000), strict=True)) if table_3 else {})


# data set → model (C, U, QC) → metric, named as in eval/metrics.json.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "C": _paper_row((5.91, 0.0, 0.0), (10.97, 8.58, 0.61, 0.58)),
        "U": _paper_row((3.46, 1.88e8, 1.90e-3), (2.50, 9.58, 0.67, 0.60)),
        "QC": _paper_row((3.38, 3.49e7, 8.41e-4), (2.48, 9.70, 0.67, 0.60)),
    },
    "imagenet32": {
        "C": _paper_row((5.10, 0.0, 0.0), (28.97, 8.58, 0.61, 0.45)),
        "U": _paper_row((3.96, 2.05e7, 7.17e-4), (19.82, 9.89, 0.60, 0.52)),
        "QC": _paper_row((3.83, 1.13e7, 5.47e-4), (19.62, 9.94, 0.61, 0.52)),
    },
    "cifar100": {
        "C": _paper_row((5.34, 0.0, 0.0)),
        "U": _paper_row((3.50, 2.98e8, 2.25e-3)),
        "QC": _paper_row((3.44, 9.31e7, 1.44e-3)),
    },
    "svhn": {
        "C": _paper_row((5.00, 0.0, 0.0)),
        "U": _paper_row((2.15, 3.06e7, 6.54e-4)),
        "QC": _paper_row((2.01, 1.69e7, 4.80e-4)),
    },
}
