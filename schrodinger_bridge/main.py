"""Learn a Schrödinger bridge, measure it at every half-bridge, draw it.

python -m schrodinger_bridge.main --config=configs/dsb/2d.py:PAIR --workdir=W

Written to W: ``results.json``, ``table.md`` (also printed), ``history.json`` and ``half_bridges/``, ``errors.png``; of
points ``marginals.png``, of images ``*_images.png`` and ``*_transitions.png``. Stopped at any moment, the same command
goes on to the same result. All of it is written after every iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ml_collections import ConfigDict

from experiment.command_line import command
from experiment.results import markdown_table, with_error, write_results
from experiment.runtime import Runtime

from . import figures
from .gaussian import Normal, ipf_rows
from .half_bridges import BridgeRun
from .marginals import GaussianMarginal
from .process import BACKWARD, FORWARD


def run(config: ConfigDict, workdir: str, device: str = "auto", precision: str = "tf32") -> str | None:
    """Learn a bridge.

    Args:
        config: The bridge, configs/dsb/…; override with --config.x.y=VALUE.
        workdir: Folder of the run: checkpoints, logs, results, figures.
        device: auto, cpu, cuda or mps.
        precision: tf32, fp32, bf16 or fp16, of the networks.
    """
    if "image_size" not in config.data:
        torch.set_num_threads(1)  # of networks so small more than one only wait for each other
    runtime = Runtime(device, precision)
    with runtime.together({"config": config.to_dict(), "workdir": workdir}):
        bridge = BridgeRun(config, workdir, runtime)
        bridge.train(lambda: write(bridge))
    return write(bridge)


def write(bridge: BridgeRun) -> str | None:
    """Write results, table and figures of the iterations that are done; return the table."""
    if not bridge.runtime.is_main:
        return None
    figures.save_images(bridge)
    results = results_of(bridge)
    return write_results(bridge.workdir, results, table(results), figures.draw(bridge))


def results_of(bridge: BridgeRun) -> dict[str, object]:
    """Settings, and a row for the reference and every half-bridge; between Gaussians also what linear algebra gives."""
    results = {
        "experiment": "schrodinger_bridge",
        "config": bridge.config.to_dict(),
        "brownian_variance": bridge.reference.brownian_variance,
        "sampling_error": bridge.sampling_errors,
        "rows": bridge.history,
    }
    if bridge.config.bridge.algorithm == "ipf" and all(isinstance(m, GaussianMarginal) for m in bridge.marginals):
        laws = (Normal(m.mean.double(), m.covariance) for m in bridge.marginals)
        results["gaussian"] = ipf_rows(bridge.reference, *laws, bridge.num_half_bridges)
    return results


def table(results: Mapping) -> str:
    """In Markdown: per iteration the errors of both ends and the cost of transport."""
    config, errors = results["config"], results["sampling_error"]

    def cells(row: Mapping) -> list[str]:
        cost = with_error(row["transport_cost"], row.get("transport_cost_error"))
        if "gaussian" in results:
            cost += f" (exact {results['gaussian'][row['half_bridge']]['transport_cost']:.3g})"
        return [with_error(row["w2"], row.get("w2_error")), cost]

    reference, *learned = map(cells, results["rows"])
    rows = [["0 (reference)", "", "", *reference]]
    rows += [[i + 1, *learned[2 * i], *learned[2 * i + 1]] for i in range(len(learned) // 2)]
    header = ["iteration", "W₂, backward, to x₀", "cost, backward", "W₂, forward, to x_N", "cost, forward"]
    return (
        f"# {config['data']['dataset']} – {config['final']['dataset']}, {config['bridge']['algorithm'].upper()}\n\n"
        f"{'sliced ' if 'image_size' in config['data'] else ''}W₂ of {config['evaluation']['num_samples']} samples to "
        f"the true marginal, and E‖x_N − x₀‖², in units of the data; means over {config['evaluation']['num_sets']} "
        f"set(s), ± standard error. Two sets of true samples are {errors[BACKWARD]:.3g} (x₀) and {errors[FORWARD]:.3g} "
        f"(x_N) apart.\n\n{markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    command(run)
