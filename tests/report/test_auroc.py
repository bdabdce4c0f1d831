"""AUROC against scikit-learn's, and its standard error against repeated draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from report.auroc import auroc, write_auroc


def test_auroc_is_scikit_learns_and_its_error_that_of_repetitions():
    random = np.random.default_rng(0)
    found = []
    for _ in range(400):
        inside, outside = random.normal(0, 1, 30).round(1), random.normal(0.7, 1, 50).round(1)  # with ties
        value, error = auroc(inside, outside)
        assert value == pytest.approx(roc_auc_score(np.repeat([0, 1], (30, 50)), np.append(inside, outside)), abs=1e-12)
        found.append((value, error))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)  # known to 3.5 %


def test_files_that_are_no_scores_are_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("index,nll\n0,1.5\n1,2.5\n")
    (tmp_path / "b.csv").write_text("index,other\n0,1.5\n1,2.5\n")
    (tmp_path / "c.csv").write_text("index,nll\n0,word\n")
    for files, message in (
        ("a", "1 files are given"),
        ("ab", "no column in common"),
        ("ac", "no file of --mode=score"),
    ):
        with pytest.raises(ValueError, match=message):
            write_auroc(*(tmp_path / f"{name}.csv" for name in files))
    assert "0.50 ± 0.35" in write_auroc(tmp_path / "a.csv", tmp_path / "a.csv")
