"""From evaluated runs to the paper's tables and figures: ``python -m report.main RUN [RUN ...]``.

A run is a working directory of ``main.py`` that has been evaluated (``--mode eval``). The report puts the runs of each
data set side by side, with all that was measured, and prints Tables 2 and 3 and Figure 3 of Chao, Sun, Cheng and Lee,
"On Investigating the Conservative Property of Score-Based Generative Models" (ICML 2023, arXiv 2209.12753), the paper's
numbers beside ours and what differs from its setting below.

Statistics. Every mean m over test images comes with its standard error s. Two runs a, b are compared by

    Δ = m_a − m_b,   s_Δ = √(s_a² + s_b²),                      the errors taken as independent, or
    Δ = mean(d),     s_Δ = std(d) / √N,   d_i = a_i − b_i,      paired, where per-image values exist.

Images are hard or easy for both models alike, so the paired s_Δ is the smaller one. A ratio r = m_a / m_b has
s_r = |r| √((s_a/m_a)² + (s_b/m_b)²) to first order. |Δ| < 2 s_Δ is reported as "cannot be told apart". All of these
errors are those of the test set; how much another training seed would change a number they do not say.

Files read: see ``report.runs``; what an optional one would have shown and cannot is said in the report. Files written:
``report.md``, ``report.csv`` and the figures of ``report_figures``.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiment.files import write_atomically
from report.figures import write_figures
from report.paper import PAPER, PAPER_SOURCE, PREDICTOR_STEPS, TABLE_2, TABLE_3, differing_settings
from report.runs import (
    COLUMNS,
    INCEPTION,
    NASYM_ROUND_OFF,
    PROTOCOL,
    WITH_ERROR,
    Column,
    Run,
    by_dataset,
    dataset_key,
    load_runs,
    plain_exponent,
)

__all__ = ["format_measurement", "main", "tables_and_comparisons", "write_report"]

# ------------------------------------------------------------------------------------------------------------- numbers


def format_measurement(value: float | None, error: float | None = None) -> str:
    """``value ± error`` with two digits of the error, e.g. "3.462 ± 0.011" or "(1.881 ± 0.012)e8"; "–" for ``None``."""
    if value is None:
        return "–"
    if not math.isfinite(value) or (value == 0 and not error):
        return f"{value:g}"
    exponent = math.floor(math.log10(max(abs(value), error or 0.0)))
    scientific = not -2 <= exponent < 4
    if not error:
        return plain_exponent(f"{value:.2e}") if scientific else f"{value:.{max(2, 2 - exponent)}f}"
    scale = 10.0**exponent if scientific else 1.0
    decimals = min(max(0, 1 - math.floor(math.log10(error / scale))), 8)
    body = f"{value / scale:.{decimals}f} ± {error / scale:.{decimals}f}"
    return f"({body})e{exponent}" if scientific else body


def _format_count(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() or not math.isfinite(value) else f"{value:.1f}"


def _leaders(runs: Sequence[Run], column: Column) -> set[int]:
    """The indices of the runs whose value stands in bold.

    With standard errors: the best one, if more than two combined standard errors ahead of the runner-up. Without:
    the best and its equals, unless all are equal. Nothing to compare, nothing in bold.
    """
    values = {i: run.number(column.key) for i, run in enumerate(runs)}
    finite = {i: value for i, value in values.items() if value is not None and math.isfinite(value)}
    if column.best is None or len(finite) < 2:
        return set()
    if column.from_features and not _features_comparable(runs):
        return set()
    best, second = sorted(finite, key=finite.__getitem__, reverse=column.best is max)[:2]
    if any(runs[i].error(column.key) is not None for i in finite):
        errors = runs[best].error(column.key), runs[second].error(column.key)
        if None in errors or abs(finite[best] - finite[second]) <= 2 * math.hypot(*errors):
            return set()
        return {best}
    leaders = {i for i, value in finite.items() if value == finite[best]}
    return set() if len(leaders) == len(finite) else leaders


def _features_comparable(runs: Sequence[Run]) -> bool:
    """FID and its kin depend on the features, and their bias on the numbers of images: all must be the same."""
    keys = ("features", "num_samples", "reference", "num_reference")
    return len({tuple(run.metrics[key] for key in keys) for run in _with_features(runs)}) <= 1


def _with_features(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if any(run.number(c.key) is not None for c in COLUMNS if c.from_features)]


# -------------------------------------------------------------------------------------------------------------- tables

_TITLES = {column.key: column.title for column in COLUMNS}


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _our_table(runs: Sequence[Run]) -> str:
    cells: list[list[str]] = [[_escape(run.label)] for run in runs]
    for column in COLUMNS:
        leaders = _leaders(runs, column)
        for i, run in enumerate(runs):
            value = run.number(column.key)
            if column.best is None:
                text = _format_count(value)
            else:
                text = format_measurement(value, run.error(column.key))
            cells[i].append(f"**{text}**" if i in leaders else text)
    return _markdown_table(["Model (run)", *(c.title for c in COLUMNS)], cells)


def _table_notes(runs: Sequence[Run]) -> str:
    notes = [
        "± is one standard error over the test images (KID: over subsets of samples). **Bold** is the best value of a "
        "column: with standard errors only if it is more than two combined ones ahead of the runner-up, without (FID, "
        "IS, precision, recall) simply the best of one evaluation each. Asym = E[tr(JJᵀ) − tr(JJ)], NAsym = "
        "E[‖J − Jᵀ‖²/(4‖J‖²)], J the Jacobian of the score. NFE is the number of network evaluations; one of a "
        "conservative model costs a forward and a backward pass. – is not computed."
    ]
    samplers = {run.metrics["sampler"] or "not recorded" for run in runs}
    if len(samplers) == 1:
        notes.append(f"Sampler: {samplers.pop()}.")
    else:
        listed = "; ".join(f"{run.name}: {run.metrics['sampler'] or 'not recorded'}" for run in runs)
        notes.append(f"The runs were sampled differently ({listed}).")
    notes += _test_images_notes(runs)
    zero = [run for run in runs if run.asym_is_round_off]
    if zero:
        names, limit = ", ".join(run.label for run in zero), plain_exponent(f"{NASYM_ROUND_OFF:.0e}")
        notes.append(f"Zero up to round-off (NAsym below {limit}): Asym and NAsym of {names}.")
    return "\n\n".join(notes)


def _test_images_notes(runs: Sequence[Run]) -> list[str]:
    """Over how much of the test set NLL and Asym are means, where that was recorded."""
    notes = []
    for key, what in (("nll_images", "NLL"), ("asym_images", "Asym and NAsym")):
        counts = {run.name: (run.number(key), run.number("test_images")) for run in runs}
        counts = {name: count for name, count in counts.items() if None not in count}
        texts = {name: f"{_format_count(part)} of {_format_count(all_)}" for name, (part, all_) in counts.items()}
        if len(set(texts.values())) == 1 and len(texts) == len(runs):
            notes.append(f"{what}: over {texts[runs[0].name]} test images.")
        elif texts:
            notes.append(f"{what}: over test images, {'; '.join(f'{name}: {text}' for name, text in texts.items())}.")
    return notes


def _features_note(runs: Sequence[Run]) -> str:
    notes = []
    if not _features_comparable(runs):
        notes.append(
            "FID, KID, IS, precision and recall of these runs must not be compared with one another, and none is in "
            "bold: features, numbers of images or what was compared with differ "
            f"({'; '.join(f'{run.name}: {_features_used(run)}' for run in runs)})."
        )
    elif used := {_features_used(run) for run in _with_features(runs)}:
        backends = {run.metrics["backend"] or "not recorded" for run in _with_features(runs)}
        notes.append(f"Features: {used.pop()}; FID, KID and IS computed by {' and '.join(sorted(backends))}.")
    for features in sorted({run.metrics["features"] for run in runs if run.metrics["features"]} - set(INCEPTION)):
        accuracies = sorted(
            {
                run.number("feature_test_accuracy")
                for run in runs
                if run.metrics["features"] == features and run.number("feature_test_accuracy") is not None
            }
        )
        listed = " or ".join(f"{100 * accuracy:.1f} %" for accuracy in accuracies)
        accuracy = f"its test accuracy is {listed}" if accuracies else "its test accuracy was not recorded"
        if features.startswith("inception-"):
            accuracy = "not the published weights"
        notes.append(
            f"FID, KID, IS, precision and recall come from the features of {features} ({accuracy}): they are "
            "comparable within this report only, not with Inception FID."
        )
    return "\n\n".join(notes)


def _features_used(run: Run) -> str:
    features, reference = run.metrics["features"] or "not recorded", run.metrics["reference"]
    compared = f" against {_format_count(run.number('num_reference'))} ({reference})" if reference else ""
    return f"{features}, {_format_count(run.number('num_samples'))} samples{compared}"


def _paper_section(runs: Sequence[Run]) -> str:
    """Tables 2 and 3 of the paper, its numbers beside ours, and the settings in which the runs differ from it."""
    parts = ["# Tables 2 and 3 of the paper"]
    known = [run for run in runs if dataset_key(run.dataset) in PAPER]
    if known:
        different = {(run.path, table): differing_settings(run, table) for run in known for table in (2, 3)}
        parts.append(
            "The paper's number stands beside ours, in parentheses where the run's setting is not the paper's; the "
            "settings that differ are listed below."
        )
        parts.append(_beside_paper(known, 2, TABLE_2, different))
        ode = [run for run in known if (run.metrics["sampler"] or "").startswith("ODE")]
        pc = [run for run in known if run not in ode and TABLE_3[0] in PAPER[dataset_key(run.dataset)][run.kind]]
        if pc:
            parts.append(_beside_paper(pc, 3, TABLE_3, different))
        if ode:
            parts.append(_ode_table(ode))
        parts += [_settings_list(known, pc, different), PAPER_SOURCE]
    unknown = [group[0].dataset for group in by_dataset(runs) if group[0] not in known]
    if unknown:
        which = "these data sets" if len(unknown) > 1 else "this data set"
        parts.append(f"The paper has no numbers for {which} ({', '.join(unknown)}).")
    return "\n\n".join(parts)


def _beside_paper(
    runs: Sequence[Run], table: int, keys: Sequence[str], different: dict[tuple[Path, int], list[str]]
) -> str:
    header = ["Data set", "Model (run)"]
    if table == 3:
        header += [f"Predictor steps (paper: {PREDICTOR_STEPS})", "Network evaluations"]
    for key in keys:
        header += [_TITLES[key], "paper"]
    rows = []
    for run in runs:
        row = [_escape(run.dataset), _escape(run.label)]
        if table == 3:
            row += [_format_count(run.number("sampling_steps")), _format_count(run.number("nfe_sampling"))]
        for key in keys:
            paper = _format_paper(key, PAPER[dataset_key(run.dataset)][run.kind][key])
            row += [format_measurement(run.number(key), run.error(key))]
            row += [f"({paper})" if different[run.path, table] else paper]
        rows.append(row)
    caption = {2: "Table 2: likelihood and asymmetry.", 3: "Table 3: quality of samples of the PC sampler."}[table]
    return f"{caption}\n\n{_markdown_table(header, rows)}"


def _ode_table(runs: Sequence[Run]) -> str:
    """As the paper's Table 4, of which we have no numbers."""
    rows = [
        [_escape(run.dataset), _escape(run.label), _format_count(run.number("nfe_sampling"))]
        + [format_measurement(run.number(key)) for key in TABLE_3]
        for run in runs
    ]
    header = ["Data set", "Model (run)", "Network evaluations", *(_TITLES[key] for key in TABLE_3)]
    return f"Quality of samples of the ODE sampler (our numbers only).\n\n{_markdown_table(header, rows)}"


def _settings_list(known: Sequence[Run], pc: Sequence[Run], different: dict[tuple[Path, int], list[str]]) -> str:
    lines = []
    for run in known:
        lists = {table: different[run.path, table] for table in ((2, 3) if run in pc else (2,))}
        shared = [setting for setting in lists[2] if all(setting in listed for listed in lists.values())]
        only = {f"Table {table}": [s for s in listed if s not in shared] for table, listed in lists.items()}
        parts = [f"{where}: {'; '.join(listed)}" for where, listed in ({"": shared} | only).items() if listed]
        lines.append(f"- {run.label}: {'. '.join(part.removeprefix(': ') for part in parts) or 'the same setting'}.")
    return "\n".join(["Settings that differ from the paper's:", "", *lines])


def _format_paper(key: str, value: float) -> str:
    if value == 0:
        return "0"
    return plain_exponent(f"{value:{'.2e' if key in ('asym', 'nasym') else '.2f'}}")


def _csv_text(runs: Sequence[Run]) -> str:
    """The table with every digit: repr of a float reads back as the very same float; an empty cell is not computed."""
    keys = [key for c in COLUMNS for key in (c.key, f"{c.key}_se") if key == c.key or c.key in WITH_ERROR]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    measured = ("sampler", "likelihood", "features", "reference", "backend")
    descriptions = ("run", "model", "dataset", "qc_weight", "path", *measured)
    keys += ["feature_test_accuracy", *PROTOCOL]
    writer.writerow([*descriptions, *keys])
    for run in runs:
        described = [run.name, run.model, run.dataset, repr(run.qc_weight), str(run.path)]
        described += [run.metrics[key] or "" for key in measured]
        numbers = [run.metrics[key] for key in keys]
        writer.writerow([*described, *("" if value is None else repr(value) for value in numbers)])
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- comparisons


def _baselines(groups: Sequence[Sequence[Run]], name: str | None) -> list[Run | None]:
    """For the runs of each data set the one to compare with: that of the given name, else the first U run."""
    found = [[run for run in group if name in (run.name, run.path.resolve().name)] for group in groups]
    if name is not None and (not any(found) or any(len(runs) > 1 for runs in found)):
        problem = "fits more than one run" if any(found) else "is not among the runs"
        allowed = ", ".join(run.name for group in groups for run in group)
        raise ValueError(f"--baseline={name!r} {problem}; allowed: {allowed}")
    first_u = [next((run for run in group if run.kind == "U"), None) for group in groups]
    return [runs[0] if runs else default for runs, default in zip(found, first_u, strict=True)]


def _pairing(run: Run, baseline: Run) -> tuple[np.ndarray | None, str]:
    """Per-image differences (N,) in bits/dim, or ``None`` with the reason why the runs cannot be paired."""
    for each in (run, baseline):
        if each.nll is None:
            return None, f"unpaired: {each.name} has no eval/nll.npz"
        if not np.isclose(each.nll.mean(), each.number("nll_bits_per_dim"), rtol=1e-4, atol=1e-6):
            return None, f"unpaired: eval/nll.npz and eval/metrics.json of {each.name} are not of one evaluation"
    if run.nll.shape != baseline.nll.shape:
        return None, f"unpaired: {run.nll.size} and {baseline.nll.size} test images"
    return run.nll - baseline.nll, f"paired over {run.nll.size} test images"


def _compare_nll(run: Run, baseline: Run) -> str:
    ours, theirs = run.number("nll_bits_per_dim"), baseline.number("nll_bits_per_dim")
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return "NLL: not computed for both runs."
    differences, how = _pairing(run, baseline)
    errors = run.error("nll_bits_per_dim"), baseline.error("nll_bits_per_dim")
    if differences is not None and differences.size > 1:
        delta, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(differences.size))
    elif None not in errors:
        delta, error = ours - theirs, math.hypot(*errors)
    else:
        return f"NLL: ΔNLL = {ours - theirs:+.4f} bits/dim, without a standard error; nothing can be concluded ({how})."
    measured = f"ΔNLL = {_signed(delta, error)} bits/dim ({how})"
    if abs(delta) < 2 * error or delta == 0:
        return f"NLL: {measured}; the two cannot be told apart at two standard errors."
    return f"NLL: {measured}; {'lower (better)' if delta < 0 else 'higher (worse)'}{_by_errors(delta, error)}."


def _signed(delta: float, error: float) -> str:
    text = format_measurement(delta, error)
    return text if text.startswith(("-", "(")) or delta == 0 else f"+{text}"


def _by_errors(delta: float, error: float) -> str:
    return f" by {abs(delta) / error:.1f} standard errors" if error > 0 else ""


def _compare_ratio(run: Run, baseline: Run, key: str, title: str) -> str:
    ours, theirs = run.number(key), baseline.number(key)
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return f"{title}: not computed for both runs."
    if baseline.asym_is_round_off or theirs == 0:
        return f"{title}: no ratio, the baseline's is zero up to round-off."
    if run.asym_is_round_off:
        return f"{title}: zero up to round-off ({format_measurement(ours)}; baseline {format_measurement(theirs)})."
    errors = run.error(key), baseline.error(key)
    ratio = ours / theirs
    if None in errors:
        measured = f"{format_measurement(ratio)} times the baseline's"
        return f"{title}: {measured}, without a standard error; nothing can be concluded."
    relative = math.hypot(errors[0] / ours, errors[1] / theirs) if ours else 0.0
    measured = f"{format_measurement(ratio, abs(ratio) * relative)} times the baseline's"
    if abs(ours - theirs) < 2 * math.hypot(*errors):
        return f"{title}: {measured}; the two cannot be told apart at two standard errors."
    return f"{title}: {measured}; {'lower' if ours < theirs else 'higher' if ours > theirs else 'the same'}."


def _comparison_section(runs: Sequence[Run], baseline: Run | None) -> str:
    if len(runs) == 1:
        return "One run: nothing to compare it with."
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
        lines = [
            _compare_nll(run, baseline),
            _compare_ratio(run, baseline, "nasym", "NAsym"),
            _compare_ratio(run, baseline, "asym", "Asym"),
        ]
        steps = run.number("checkpoint_step"), baseline.number("checkpoint_step")
        if steps[0] != steps[1]:
            lines.append(
                f"Trained for different lengths: step {_format_count(steps[0])}, the baseline's "
                f"{_format_count(steps[1])}; part of a difference may come from that."
            )
        paragraphs.append("\n".join([f"{run.label} against the baseline:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(paragraphs)


def tables_and_comparisons(runs: Sequence[Run], baseline: str | None = None) -> list[str]:
    """The report without its figures, in Markdown: a section for each data set (``by_dataset``), last the paper's
    tables.

    Raises:
        ValueError: ``baseline`` is not the name of one of the runs.
    """
    groups = by_dataset(runs)
    sections = []
    for group, base in zip(groups, _baselines(groups, baseline), strict=True):
        parts = [
            f"# Results on {group[0].dataset}",
            _our_table(group),
            _table_notes(group),
            _features_note(group),
            "## Comparison with the baseline",
            _comparison_section(group, base),
        ]
        sections.append("\n\n".join(part for part in parts if part))
    return [*sections, _paper_section(runs)]


# ------------------------------------------------------------------------------------------------------------- writing


def write_report(paths: Sequence[Path], output: Path | None = None, baseline: str | None = None) -> str:
    """Writes tables, comparisons and figures of the runs and returns the text of ``report.md``.

    Runs of several data sets get a section and figures for each.

    Args:
        paths: the working directories, in the order of the tables' rows.
        output: the folder written to; without it the folder that all runs lie in.
        baseline: the name of the run the others are compared with; without it the first U run of the data set.

    Raises:
        FileNotFoundError, ValueError: see ``load_runs``; also an unknown baseline, and ``output`` being a file.
    """
    runs = load_runs(paths)
    *texts, paper = tables_and_comparisons(runs, baseline)
    output = output or Path(os.path.commonpath([path.resolve().parent for path in paths]))
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; a folder is needed")
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, (group, text) in enumerate(zip(by_dataset(runs), texts, strict=True), start=1):
        prefix = f"{number}_{dataset_key(group[0].dataset)}_" if len(texts) > 1 else ""
        sections += [text, *write_figures(group, output, prefix)]
    text = "\n\n".join([*sections, paper]) + "\n"
    for name, content in (("report.csv", _csv_text(runs)), ("report.md", text)):
        write_atomically(output / name, lambda file, content=content: file.write(content.encode()))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m report.main", description="Tables and figures of the paper from evaluated runs."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a --workdir of main.py, evaluated")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to write to (default: the runs' own)")
    parser.add_argument("--baseline", metavar="NAME", help="run to compare with (default: the first U run)")
    flags = parser.parse_args(arguments)
    try:
        text = write_report(flags.runs, flags.output, flags.baseline)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
