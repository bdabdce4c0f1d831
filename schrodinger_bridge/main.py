"""Learn a Schrödinger bridge, measure it at every half-bridge, draw it.

python -m schrodinger_bridge.main --config=configs/dsb/2d.py:PAIR --workdir=W [--animate]

Written to W: ``results.json``, ``table.md`` (also printed), ``metrics.jsonl`` and ``tensorboard/``, ``errors.png``; of
points ``marginals.png``, of images ``*_images.png`` and ``*_transitions.png``. Stopped at any moment, the same command
goes on to the same result.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping

from absl import app, flags
from ml_collections import config_flags

from experiment.command_line import parse_flags
from experiment.files import write_atomically

TITLES = {"backward": "backward, to x₀", "forward": "forward, to x_N"}


def results_of(run) -> dict[str, object]:
    """What results.json holds: settings, and a row for the reference and every half-bridge."""
    results = {
        "experiment": "schrodinger_bridge",
        "config": run.config.to_dict(),
        "brownian_variance": run.reference.brownian_variance,
        "sampling_error": run.sampling_errors,
        "rows": run.history,
    }
    if (exact := gaussian_rows(run)) is not None:
        results["gaussian"] = exact
    return results


def gaussian_rows(run) -> list[dict[str, float]] | None:
    """For a bridge between Gaussians, what linear algebra gives in the place of learning: W₂ at the end of every
    half-bridge, and its cost of transport."""
    import torch

    from .gaussian import AffineChain, Normal, half_bridge, wasserstein_gaussian
    from .marginals import GaussianMarginal
    from .process import BACKWARD, FORWARD

    if not all(isinstance(m, GaussianMarginal) for m in run.marginals) or run.config.bridge.algorithm != "ipf":
        return None
    first, last = (Normal(m.mean.double(), m.covariance) for m in run.marginals)
    identity = torch.eye(len(first.mean), dtype=torch.float64)
    factor = run.reference.factor.cpu()
    chain = AffineChain(
        FORWARD,
        first,
        factor[:, None, None] * identity,
        (1 - factor)[:, None] * run.reference.mean.double().cpu(),
        run.gammas,
    )
    rows = []
    for number in range(run.num_half_bridges + 1):
        if number:
            chain = half_bridge(chain, last if chain.direction == FORWARD else first)
        laws, cross = chain.law()
        end, wanted = (laws[0], first) if chain.direction == BACKWARD else (laws[-1], last)
        spread = laws[0].covariance + laws[-1].covariance - cross - cross.mT
        cost = float(torch.trace(spread) + ((laws[0].mean - laws[-1].mean) ** 2).sum())
        rows.append({"half_bridge": number, "w2": wasserstein_gaussian(end, wanted), "transport_cost": cost})
    return rows


def with_error(row: Mapping, name: str) -> str:
    """A measured number, ± its standard error if several sets of samples gave one, to the error's second digit."""
    error = row.get(f"{name}_error")
    if error is None:
        return f"{row[name]:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{row[name]:.{decimals}f} ± {error:.{decimals}f}"


def table(results: Mapping) -> str:
    """In Markdown: per iteration the errors of both ends and the cost of transport."""
    rows = {(row["iteration"], row["direction"]): row for row in results["rows"]}
    config, errors = results["config"], results["sampling_error"]
    exact = {row["half_bridge"]: row for row in results.get("gaussian", [])}
    sliced = "sliced " if "image_size" in config["data"] else ""
    lines = [
        f"# {config['data']['dataset']} – {config['final']['dataset']}, {config['bridge']['algorithm'].upper()}",
        "",
        f"{sliced}W₂ of {config['evaluation']['num_samples']} samples to the true marginal, and E‖x_N − x₀‖², in units "
        f"of the data; means over {config['evaluation']['num_sets']} set(s), ± standard error. Two sets of true "
        f"samples are {errors['backward']:.3g} (x₀) and {errors['forward']:.3g} (x_N) apart.",
        "",
        "| iteration | " + " | ".join(f"W₂, {t} | cost, {t}" for t in TITLES.values()) + " |",
        "|---" * (1 + 2 * len(TITLES)) + "|",
    ]
    for iteration in sorted({iteration for iteration, _ in rows}):
        cells = []
        for direction in TITLES:
            row = rows.get((iteration, direction))
            for name in ("w2", "transport_cost"):
                cell = "" if row is None else with_error(row, name)
                if row is not None and row["half_bridge"] in exact and name == "transport_cost":
                    cell += f" (exact {exact[row['half_bridge']][name]:.3g})"
                cells.append(cell)
        lines.append(f"| {iteration or '0 (reference)'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch  # slow to import, which --help and a mistyped flag need not wait for

    from run_setup import Runtime

    from . import figures
    from .training import BridgeRun

    if "image_size" not in options.config.data:
        torch.set_num_threads(1)  # of networks so small more than one only wait for each other
    try:
        run = BridgeRun(options.config, options.workdir, Runtime(options.device, options.precision))
        run.claim()
        run.restore()
        run.train()
        if not run.accelerator.is_main_process:
            return
        results = results_of(run)
        text = table(results)
        for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("table.md", text)):
            write_atomically(run.workdir / name, lambda file, content=content: file.write(content.encode()))
        print(text)
        for path in figures.draw_all(run, animate=options.animate):
            print(path)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "The bridge, configs/dsb/…; override with --config.x.y=VALUE.")
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results, figures.")
    flags.DEFINE_bool("animate", False, "Also write an animation of each direction (GIF).")
    flags.DEFINE_string("device", "auto", "auto, cpu, cuda or mps.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16, of the networks.")
    flags.mark_flags_as_required(["config", "workdir"])


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
