"""From evaluated runs to the paper's tables and figures: ``python -m report.main RUN [RUN …] [--output=DIR]``.

A run is a working directory of ``main.py`` that has been evaluated. The report has a section for the runs of each data
set and, where the paper has numbers of it, Tables 2 and 3 of Chao, Sun, Cheng and Lee (ICML 2023, arXiv 2209.12753),
its numbers next to ours.

Statistics. Every mean m over test images comes with its standard error s. Two runs a, b are compared by

    Δ = m_a − m_b,   s_Δ = √(s_a² + s_b²),                      the errors taken as independent, or
    Δ = mean(d),     s_Δ = std(d) / √N,   d_i = a_i − b_i,      paired, where per-image values exist.

A ratio r = m_a / m_b has s_r = |r| √((s_a/m_a)² + (s_b/m_b)²) to first order. |Δ| < 2 s_Δ is reported as "cannot be
told apart", and only what is told apart from all others stands in bold: nothing without an error. The errors are those
of the test set, not of another training seed.

Files read: see ``report.runs``. Files written: ``report.html``, one file with all figures in it; ``report.md`` and the
figures of ``report.figures``; ``report.csv``.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiment.command_line import command
from experiment.files import write_text
from experiment.results import markdown_table, mean_and_error, number, with_error
from report.figures import write_figures
from report.page import to_html, write_page
from report.paper import INCEPTION, PAPER, PAPER_SOURCE, PREDICTOR_STEPS, TABLE_2, TABLE_3, differing_settings
from report.runs import (
    COLUMNS,
    NASYM_ROUND_OFF,
    Column,
    Run,
    by_dataset,
    columns_of,
    dataset_key,
    load_runs,
    nll_key,
)

TITLES = {column.key: column.title for column in COLUMNS}


def _measured(run: Run, key: str) -> str:
    """A metric with its standard error, where it has one; "–" where it was not computed."""
    return number(None) if run.number(key) is None else with_error(run.number(key), run.error(key))


def _count(value: float | None) -> str:
    return number(value and round(value, 1), digits=9)


def _difference(a: Run, b: Run, key: str) -> tuple[float, float | None, str]:
    """Δ = m_a − m_b, its standard error, None without those of the means, and how it comes about."""
    delta, errors, how = a.number(key) - b.number(key), (a.error(key), b.error(key)), ""
    if key == nll_key(a.metrics):
        differences, how = _pairing(a, b)
        if differences is not None and differences.size > 1:
            return *mean_and_error(differences), how
    return delta, None if None in errors else math.hypot(*errors), how


def _leader(runs: Sequence[Run], column: Column) -> Run | None:
    """The run whose value stands in bold: the best, if it is more than two standard errors of the difference ahead of
    every other one."""
    measured = [run for run in runs if run.number(column.key) is not None]
    if column.best is None or len(measured) < 2 or (column.from_features and not _features_comparable(runs)):
        return None
    best = column.best(measured, key=lambda run: run.number(column.key))
    differences = [_difference(best, run, column.key) for run in measured if run is not best]
    ahead = all(error is not None and abs(delta) > 2 * error for delta, error, _ in differences)
    return best if ahead else None


def _features_comparable(runs: Sequence[Run]) -> bool:
    """FID and its kin depend on the features, and their bias on the numbers of images: all must be the same."""
    return len({_features_used(run) for run in runs if run.metrics["features"]}) <= 1


def _features_used(run: Run) -> str:
    compared = f"{_count(run.number('num_reference'))} ({run.metrics['reference']})"
    return f"{run.metrics['features']}, {_count(run.number('num_samples'))} samples against {compared}"


def _our_table(runs: Sequence[Run]) -> str:
    rows = [[run.label.replace("|", "\\|")] for run in runs]
    columns = columns_of(runs)
    for column in columns:
        leader = _leader(runs, column)
        for row, run in zip(rows, runs, strict=True):
            text = _measured(run, column.key) if column.best else _count(run.number(column.key))
            row.append(f"**{text}**" if run is leader else text)
    return markdown_table(["Model (run)", *(column.title for column in columns)], rows)


def _table_notes(runs: Sequence[Run]) -> list[str]:
    """How to read the table."""
    notes = [
        "± is one standard error over the test images (KID: over subsets of samples). **Bold** is the best value of a "
        "column if it is more than two standard errors of the difference, of NLL paired by image, ahead of every "
        "other; a column without errors (FID, IS, precision, recall: one evaluation each) has none. – is not computed.",
        "Asym = E[tr(JJᵀ) − tr(JJ)], NAsym = E[‖J − Jᵀ‖²/(4‖J‖²)], J the Jacobian of the score. NFE is the number of "
        "network evaluations; one of a conservative model costs a forward and a backward pass.",
        _of_each_run("Sampler", {run.name: run.metrics["sampler"] for run in runs}),
    ]
    for key, of, what in ((nll_key(runs[0].metrics), "nll_images", "NLL"), ("asym", "asym_images", "Asym and NAsym")):
        counts = {run.name: (run.number(of), run.number("test_images")) for run in runs if run.number(key) is not None}
        if counts:
            texts = {name: f"{_count(part)} of {_count(whole)}" for name, (part, whole) in counts.items()}
            notes.append(_of_each_run(f"Test images of {what}", texts))
    levels = {run.name: [run.number("asym_levels"), run.number("asym_first_level")] for run in runs}
    if texts := {name: f"t = i/{_count(n)} from i = {_count(first)}" for name, (n, first) in levels.items() if n}:
        notes.append(_of_each_run("Noise levels of Asym and NAsym", texts))
    if zero := [run.label for run in runs if run.asym_is_round_off]:
        notes.append(f"Zero up to round-off (NAsym below {NASYM_ROUND_OFF:g}): Asym and NAsym of {', '.join(zero)}.")
    return notes + _features_notes([run for run in runs if run.metrics["features"]])


def _samplers(runs: Sequence[Run]) -> str:
    """Of every sampler that a run was asked for, the share of samples that are no images."""
    rows = []
    for run in runs:
        for of in run.samplers:
            counts = _count(of["nfe_sampling"]), _count(of["num_samples"])
            rows.append((run.label.replace("|", "\\|"), of["sampler"], *counts, f"{100 * of['outside_range']:.3g} %"))
    if not rows:
        return ""
    header = ("Model (run)", "Sampler", "NFE", "Samples", "Outside of [−0.5, 1.5]")
    explained = "The last column: samples of which any pixel left this range, black being 0 and white 1."
    return f"{markdown_table(header, rows)}\n{explained}"


def _provenance(runs: Sequence[Run]) -> str:
    rows = [
        (
            run.label.replace("|", "\\|"),
            run.metrics.get("code_version") or "–",
            run.evaluated,
            run.config["seed"],
            f"{run.metrics['parameters']:,}" if run.metrics.get("parameters") else "–",
            _count(run.number("checkpoint_step")),
            f"{run.training_seconds / 60:.1f} min" if run.training_seconds else "–",
            run.metrics.get("hardware") or "–",
            f"`python main.py --workdir={run.path} --mode=eval`",
        )
        for run in runs
    ]
    header = ("Model (run)", "Commit", "Evaluated", "Seed", "Parameters", "Step", "Training", "Hardware", "Command")
    explained = "The settings of each run are in its config.json. Training is the time of its own steps, without those"
    return f"{markdown_table(header, rows)}\n{explained} of the run that it began from."


def _of_each_run(what: str, texts: dict[str, str]) -> str:
    """What holds for all runs, or for each by name."""
    if len(set(texts.values())) == 1:
        return f"{what}: {next(iter(texts.values()))}."
    return f"{what}: {'; '.join(f'{name}: {text}' for name, text in texts.items())}."


def _features_notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    if runs:
        backends = " and ".join(sorted({run.metrics["backend"] for run in runs}))
        used = _of_each_run("Features", {run.name: _features_used(run) for run in runs})
        notes.append(f"{used} FID, KID and IS computed by {backends}.")
    if not _features_comparable(runs):
        notes.append(
            "FID, KID, IS, precision and recall of these runs must not be compared with one another, and none is in "
            "bold: features, numbers of images or what was compared with differ."
        )
    for name in sorted({run.metrics["features"] for run in runs} - set(INCEPTION)):
        accuracies = {run.number("feature_test_accuracy") for run in runs if run.metrics["features"] == name} - {None}
        described = f"test accuracy {' or '.join(f'{100 * accuracy:.1f} %' for accuracy in sorted(accuracies))}"
        if name.startswith("inception-"):
            described = "not the published weights"
        notes.append(
            f"FID, KID, IS, precision and recall come from the features of {name} ({described}): they are "
            "comparable within this report only, not with Inception FID."
        )
    return notes


def _paper_section(runs: Sequence[Run]) -> str:
    """Tables 2 and 3 of the paper, its numbers next to ours, and the settings in which the runs differ from it."""
    known = [run for run in runs if dataset_key(run.dataset) in PAPER]
    if not known:
        return ""
    parts = [
        "# Tables 2 and 3 of the paper",
        "The paper's number stands next to ours, in parentheses where the run's setting is not the paper's; the "
        "settings that differ are listed below.",
        f"Table 2: likelihood and asymmetry.\n\n{_next_to_paper(known, 2, TABLE_2)}",
    ]
    by_pc = [run for run in known if TABLE_3[0] in _paper(run) and run.metrics["sampler"].startswith("PC")]
    if by_pc:
        parts.append(f"Table 3: quality of samples of the PC sampler.\n\n{_next_to_paper(by_pc, 3, TABLE_3)}")
    parts.append("Settings that differ from the paper's:\n\n" + "\n".join(map(_settings_line, known)))
    return "\n\n".join([*parts, PAPER_SOURCE])


def _paper(run: Run) -> dict[str, str]:
    return PAPER[dataset_key(run.dataset)][run.kind]


def _next_to_paper(runs: Sequence[Run], table: int, keys: Sequence[str]) -> str:
    counts = {}
    if table == 3:
        counts = {
            f"Predictor steps (paper: {PREDICTOR_STEPS})": "sampling_steps",
            "Network evaluations": "nfe_sampling",
        }
    rows = []
    for run in runs:
        row = [run.dataset, run.label.replace("|", "\\|"), *(_count(run.number(key)) for key in counts.values())]
        for key in keys:
            paper = _paper(run)[key]
            row += [_measured(run, key), f"({paper})" if differing_settings(run, table) else paper]
        rows.append(row)
    return markdown_table(["Data set", "Model (run)", *counts, *(t for k in keys for t in (TITLES[k], "paper"))], rows)


def _settings_line(run: Run) -> str:
    table_2, table_3 = (differing_settings(run, table) for table in (2, 3))
    shared = [setting for setting in table_2 if setting in table_3]
    parts = ["; ".join(shared)] if shared else []
    for table, settings in (("Table 2", table_2), ("Table 3", table_3)):
        if only := [setting for setting in settings if setting not in shared]:
            parts.append(f"{table}: {'; '.join(only)}")
    return f"- {run.label}: {'. '.join(parts) or 'the same setting'}."


def _baselines(groups: Sequence[Sequence[Run]], name: str) -> list[Run | None]:
    """For the runs of each data set the one to compare with: that of the given name, else the first U run."""
    found = [[run for run in group if name in (run.name, run.path.resolve().name)] for group in groups]
    if name and (not any(found) or any(len(runs) > 1 for runs in found)):
        problem = "fits more than one run" if any(found) else "is not among the runs"
        allowed = ", ".join(run.name for group in groups for run in group)
        raise ValueError(f"--baseline={name!r} {problem}; allowed: {allowed}")
    first_u = [next((run for run in group if run.kind == "U"), None) for group in groups]
    return [runs[0] if runs else default for runs, default in zip(found, first_u, strict=True)]


def _pairing(run: Run, baseline: Run) -> tuple[np.ndarray | None, str]:
    """Per-image differences (N,) of the NLL, or ``None`` with the reason why the runs cannot be paired."""
    for each in (run, baseline):
        if each.nll is None:
            return None, f"unpaired: {each.name} has no eval/nll.npz"
        if not np.isclose(each.nll.mean(), each.number(nll_key(each.metrics)), rtol=1e-4, atol=1e-6):
            return None, f"unpaired: eval/nll.npz and eval/metrics.json of {each.name} are not of one evaluation"
    if run.nll.shape != baseline.nll.shape:
        return None, f"unpaired: {run.nll.size} and {baseline.nll.size} test images"
    return run.nll - baseline.nll, f"paired over {run.nll.size} test images"


def _compare_nll(run: Run, baseline: Run) -> str:
    key = nll_key(run.metrics)
    unit = key.split("_")[1]
    ours, theirs = run.number(key), baseline.number(key)
    if ours is None or theirs is None:
        return "NLL: not computed for both runs."
    delta, error, how = _difference(run, baseline, key)
    if error is None:
        return f"NLL: ΔNLL = {delta:+.4f} {unit}/dim, without a standard error; nothing can be concluded ({how})."
    measured = f"ΔNLL = {'+' if delta > 0 else ''}{with_error(delta, error)} {unit}/dim ({how})"
    if abs(delta) < 2 * error or delta == 0:
        return f"NLL: {measured}; the two cannot be told apart at two standard errors."
    certainty = f" by {abs(delta) / error:.1f} standard errors" if error > 0 else ""
    return f"NLL: {measured}; {'lower (better)' if delta < 0 else 'higher (worse)'}{certainty}."


def _compare_ratio(run: Run, baseline: Run, key: str, title: str) -> str:
    ours, theirs = run.number(key), baseline.number(key)
    if ours is None or theirs is None:
        return f"{title}: not computed for both runs."
    if baseline.asym_is_round_off or theirs == 0:
        return f"{title}: no ratio, the baseline's is zero up to round-off."
    if run.asym_is_round_off:
        return f"{title}: zero up to round-off ({number(ours, 4)}; baseline {number(theirs, 4)})."
    errors, ratio = (run.error(key), baseline.error(key)), ours / theirs
    if None in errors:
        return f"{title}: {number(ratio, 4)} times the baseline's, without a standard error; nothing can be concluded."
    relative = math.hypot(errors[0] / ours, errors[1] / theirs) if ours else 0.0
    measured = f"{title}: {with_error(ratio, abs(ratio) * relative)} times the baseline's"
    if abs(ours - theirs) < 2 * math.hypot(*errors) or ours == theirs:
        return f"{measured}; the two cannot be told apart at two standard errors."
    return f"{measured}; {'lower' if ours < theirs else 'higher'}."


def _comparison_section(runs: Sequence[Run], baseline: Run | None) -> str:
    if len(runs) == 1:
        return ""
    if baseline is None:
        return "No comparison: none of the runs is a U run, and no --baseline was given."
    paragraphs = [
        f"Baseline: {baseline.label}. The standard errors are those of the test set. They do not cover the variation "
        "from one training seed to another; for that, train with several seeds. Errors of ratios treat the two runs "
        "as independent."
    ]
    for run in runs:
        if run is baseline:
            continue
        ratios = (_compare_ratio(run, baseline, title.lower(), title) for title in ("NAsym", "Asym"))
        lines = [_compare_nll(run, baseline), *ratios]
        steps = run.metrics["checkpoint_step"], baseline.metrics["checkpoint_step"]
        if steps[0] != steps[1]:
            lines.append(
                f"Trained for different lengths: step {steps[0]}, the baseline's {steps[1]}; part of a difference may "
                "come from that."
            )
        paragraphs.append("\n".join([f"{run.label} against the baseline:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(paragraphs)


def report_text(
    runs: Sequence[Run], baseline: str = "", figures: Callable[[Sequence[Run], int], Mapping[str, str]] | None = None
) -> str:
    """The report in Markdown: a part for each data set (``by_dataset``), last the paper's tables. What there is nothing
    of has no section.

    Args:
        figures: draws those of the runs of the i-th data set; of each, by name, its Markdown.

    Raises:
        ValueError: ``baseline`` is not the name of one of the runs.
    """
    groups, parts = by_dataset(runs), []
    for i, (group, base) in enumerate(zip(groups, _baselines(groups, baseline), strict=True), start=1):
        drawn = figures(group, i) if figures else {}
        parts += [f"# Results on {group[0].dataset}", _our_table(group).rstrip()]
        parts.append("\n".join(f"- {note}" for note in _table_notes(group)))
        for heading, *texts in (
            ("Likelihood and asymmetry", _comparison_section(group, base), drawn.get("asymmetry")),
            ("Samples", _samplers(group), drawn.get("samples")),
            ("Provenance", _provenance(group)),
        ):
            if texts := [text for text in texts if text]:
                parts += [f"## {heading}", *texts]
    return "\n\n".join(filter(None, [*parts, _paper_section(runs)]))


def _csv_text(runs: Sequence[Run]) -> str:
    """All metrics with every digit; an empty cell is not computed."""
    buffer = io.StringIO()
    metrics = sorted({key for run in runs for key in run.metrics})
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "model", "dataset", "qc_weight", "path", *metrics])
    for run in runs:
        settings = run.name, run.model, run.dataset, run.config["training"]["qc_weight"], run.path
        writer.writerow([*settings, *map(run.metrics.get, metrics)])
    return buffer.getvalue()


def write_report(*runs: str | Path, output: str | Path = "", baseline: str = "") -> str:
    """Write tables, comparisons and figures of the runs and return the text of ``report.md``.

    ``runs`` are the working directories, in the order of the tables' rows. Runs of several data sets get a section and
    figures for each.

    Args:
        output: Folder to write to; empty: the folder that all runs lie in.
        baseline: Name of the run that the others are compared with; empty: the first U run of the data set.

    Raises:
        FileNotFoundError, ValueError: see ``load_runs``; also an unknown baseline, and ``output`` being a file.
    """
    loaded = load_runs(runs)
    folder = Path(output or os.path.commonpath([run.path.resolve().parent for run in loaded]))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output={folder} is a file; a folder is needed")
    _baselines(by_dataset(loaded), baseline)  # an unknown one is said before anything is written

    def figures(group: Sequence[Run], number: int) -> dict[str, str]:
        several = len(by_dataset(loaded)) > 1
        return write_figures(group, folder, f"{number}_{dataset_key(group[0].dataset)}_" if several else "")

    text = report_text(loaded, baseline, figures)
    write_text(folder / "report.csv", _csv_text(loaded))
    write_text(folder / "report.md", text + "\n")
    write_page(folder / "report.html", "Report", to_html(text, folder))
    return text


if __name__ == "__main__":
    command(write_report)
