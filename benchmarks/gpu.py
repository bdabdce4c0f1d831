"""What a GPU makes of training steps, samplers and the likelihood.

python -m benchmarks.gpu [--parts=training,sampling,likelihood] [--blocks=4,8] [--output=FOLDER]

The networks are NCSN++ of base width 128 with attention at 16×16, as the paper has them, for images of 3×32×32. Of each
training step: time, memory, operations as ``benchmarks.training_step`` counts them, and how long the GPU had nothing to
do while the host prepared its work. Results are written as they come, so that what was stopped is not lost.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import run_lib
from benchmarks.measure import clock_of, in_turn, operations_of, peak_memory
from benchmarks.training_step import FOUR, IMAGES, LAZY, QC, C, make_trainer, take
from configs.defaults import base_config
from experiment.command_line import command
from experiment.files import write_json, write_text
from experiment.randomness import SampleGenerators, rademacher_like
from experiment.results import markdown_table
from experiment.runtime import allow_tf32
from likelihood import LikelihoodEvaluator
from sampling import make_sampler

STEPS: dict[str, dict] = {
    "U, fp32": {},
    "U, TF32": {},
    "U, bf16, contiguous": {},
    "U, bf16": {},
    "U, TF32, compiled": {},
    "U, bf16, compiled": {},
    "U, TF32, paper": {},
    "QC, K = 1, fp32": QC,
    "QC, K = 1, TF32": QC,
    "QC, K = 1, TF32, compiled": QC,
    "QC, K = 1, TF32, paper": QC,
    "QC, K = 4, TF32, compiled": FOUR,
    "QC, K = 1, every 4th step, fp32": LAZY,
    "QC, K = 1, every 4th step, TF32, compiled": LAZY,
    "QC, K = 1, every 4th step, bf16, compiled": LAZY,
    "C, TF32": C,
    "C, TF32, compiled": C,
    "C, TF32, paper": C,
}
"""Overrides of the config. 'contiguous' is memory in the order of (B, C, H, W), 'paper' what the public code does."""

PEAK = {  # TFLOP/s without sparsity, from the data sheets: float32, TF32, bfloat16
    "H100 80GB HBM3": (66.9, 494.7, 989.4),
    "H200": (66.9, 494.7, 989.4),
    "A100": (19.5, 156.0, 312.0),
}
PRECISIONS = ("fp32", "TF32", "bf16")

PC = {"method": "pc", "predictor": "reverse_diffusion", "corrector": "langevin", "n_steps_each": 1, "num_steps": 50}
SAMPLERS = {
    "PC, 50 steps": PC,
    "Heun, EDM grid, 10 steps": {"method": "few_step", "solver": "heun", "num_steps": 10},
    "SDE-DPM-Solver++(2M), 19 steps": {"method": "few_step", "solver": "dpmpp_2m_sde", "num_steps": 19},
}


def run(
    *,
    parts: str = "training,sampling,likelihood",
    blocks: str = "4,8",
    steps: str = "",
    batch: int = 128,
    samples: int = 1000,
    rounds: int = 5,
    nf: int = 128,
    device: str = "cuda",
    output: str = "runs/gpu",
) -> str:
    """Measure one after the other, and write ``gpu.json`` and ``gpu.md``.

    Args:
        parts: training, sampling, likelihood, or some of them.
        blocks: per level, for training steps; the first of them for the rest.
        steps: training steps to measure, separated by semicolons; all by default.
        batch: images of a training step.
        samples: images that are sampled at a time.
        rounds: steps that are timed of each kind; the median counts.
        nf: base width of the network.
        device: cuda, or another for a trial of the command.
        output: where the results are written.
    """
    runtime = run_lib.Runtime(device)
    where = runtime.torch_device
    counts, names = [int(count) for count in blocks.split(",")], [name.strip() for name in steps.split(";") if name]
    if unknown := [name for name in names if name not in STEPS]:
        raise ValueError(f"--steps={unknown[0]}: allowed are {'; '.join(STEPS)}")
    if unknown := set(parts.split(",")) - set(PARTS):
        raise ValueError(f"--parts={min(unknown)}: allowed are {', '.join(PARTS)}")
    card, width = card_of(where), 8192 if where.type == "cuda" else 256
    results = {"card": card, "torch": torch.__version__, "rates": measured_rates(width, where)}
    text = f"{card}, torch {torch.__version__}; products of {width}×{width} matrices: "
    text += ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in results["rates"].items()) + "\n"
    for part in parts.split(","):
        size = {"model.nf": nf, "training.batch_size": batch}
        for count in counts if part == "training" else counts[:1]:
            rows: list[dict] = []
            given = {"names": names or list(STEPS), "rounds": rounds, "samples": samples, "runtime": runtime}
            at_a_time = samples if part == "sampling" else batch
            title = f"\n{part}, nf {nf}, {count} blocks per level, {at_a_time} images at a time\n\n"
            for row in PARTS[part](size | {"model.num_res_blocks": count}, **given):
                rows.append(row)
                results[f"{part}, {count} blocks"] = rows
                write_json(Path(output) / "gpu.json", results)
                table = markdown_table(tuple(rows[0]), [tuple(map(_shown, row.values())) for row in rows])
                write_text(Path(output) / "gpu.md", text + title + table + "\n")
            text += title + table + "\n"
    return text


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def card_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def measured_rates(size: int, device: torch.device) -> dict[str, float]:
    """TFLOP/s of matrix products in every precision."""
    rates = {}
    for name in PRECISIONS:
        allow_tf32(name == "TF32")
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        rates[name] = 2 * size**3 / timed(lambda a=a: a @ a, 3, device) / 1e12
    return rates


def timed(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds, after one call that does not count."""
    return in_turn({"": lambda _: work()}, rounds, device)[""].median


def idle_share(work: Callable[[], object], device: torch.device) -> str:
    """Of the time from the first to the last operation on a GPU, the share in which there is none."""
    if device.type != "cuda":
        return "–"
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    events = [event for event in recorded.profiler.kineto_results.events() if event.device_type().name == "CUDA"]
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events)
    busy, end = 0, spans[0][0]
    for first, last in spans:
        busy, end = busy + max(0, last - max(first, end)), max(end, last)
    return f"{1 - busy / (end - spans[0][0]):.1%}"


def training(size: Mapping, *, names: Sequence[str], rounds: int, runtime: run_lib.Runtime, **_) -> Iterator[dict]:
    """A row for every kind of training step."""
    device, counts, times = runtime.torch_device, {}, {}
    clock, _ = clock_of(device)
    peaks = next((peak for card, peak in PEAK.items() if card in card_of(device)), None)
    for name in tqdm(names, unit="step"):
        precision = next(word for word in PRECISIONS if word in name.split(", "))
        allow_tf32(precision != "fp32")
        overrides, started = size | STEPS[name], clock()
        interval, batch = overrides.get("training.qc_interval", 1), overrides["training.batch_size"]
        work = None
        try:
            work = partial(take, make_trainer(name, overrides, runtime), interval)
            work()
            first = clock() - started
            seconds = timed(work, rounds, device) / interval
            memory, idle = peak_memory(work, device) / 2**30, idle_share(lambda work=work: [work(), work()], device)
            # What is compiled cannot be counted, and does the same operations.
            kind = name.removesuffix(", compiled").replace(precision, "fp32")
            if kind not in counts:
                if "compiled" in name:
                    work = partial(take, make_trainer(kind, overrides, runtime), interval)
                counts[kind] = operations_of(work) / interval / 1e12
        except torch.OutOfMemoryError:
            yield {"step": name} | dict.fromkeys(COLUMNS, "–") | {"ms": "out of memory"}
            continue
        finally:
            work = None
            gc.collect()
            torch.cuda.empty_cache()
        u, rate = times.setdefault(precision, seconds), counts[kind] / seconds
        share = f"{rate / peaks[PRECISIONS.index(precision)]:.1%}" if peaks else "–"
        values = 1e3 * seconds, seconds / u, batch / seconds, memory, counts[kind], rate, share, idle, first
        yield {"step": name, **dict(zip(COLUMNS, values, strict=True))}


COLUMNS = ("ms", "of U in the same precision", "images/s", "peak memory above the model, GiB", "TFLOP", "TFLOP/s")
COLUMNS += ("of the data sheet's peak", "GPU waits", "first step, s")


def _score(size: Mapping, device: torch.device, *, compiled: bool = False) -> run_lib.TrainedScore:
    """An untrained network, in evaluation mode."""
    config = base_config(size)
    with device:
        model = run_lib.build_score_model(config, run_lib.build_sde(config), IMAGES)
    model.eval().requires_grad_(False)
    if compiled:
        model.compile_network()
    return run_lib.TrainedScore(config, model, IMAGES, 0)


def sampling(size: Mapping, *, samples: int, runtime: run_lib.Runtime, **_) -> Iterator[dict]:
    """A row for every sampler, of images per second."""
    device = runtime.torch_device
    for precision, compiled in (("TF32", False), ("bf16", False), ("bf16", True)):
        allow_tf32(True)
        score = _score(size, device, compiled=compiled)
        for name, options in SAMPLERS.items():
            sampler = make_sampler(score.sde, {**score.config.sampling, **options}, num_scales=1000, continuous=True)
            like = torch.zeros((samples, *score.shape), device=device)
            nfe = 0.0

            def draw(sampler=sampler, like=like, score=score, half=precision == "bf16") -> None:
                nonlocal nfe
                with torch.autocast(like.device.type, torch.bfloat16, enabled=half):
                    nfe = sampler(score, like, SampleGenerators(("samples",), range(len(like)))).nfe

            rate = samples / timed(draw, 1, device)
            row = {"sampler": name, "network": f"{precision}{', compiled' * compiled}", "NFE": nfe, "images/s": rate}
            yield row | {"minutes for 50 000 at this rate": 50_000 / rate / 60, "GPU waits": idle_share(draw, device)}


def likelihood(size: Mapping, *, runtime: run_lib.Runtime, **_) -> Iterator[dict]:
    """A row for every precision, of images per second."""
    device, batch, bits = runtime.torch_device, size["training.batch_size"], {}
    for precision in ("fp32", "TF32"):
        score = _score(size, device)
        allow_tf32(precision == "TF32")
        evaluator = LikelihoodEvaluator(score.sde, time="log_ratio", solver="adams", num_steps=20)
        x = torch.rand((batch, *score.shape), generator=torch.Generator().manual_seed(0)).to(device)
        probe = rademacher_like(x, SampleGenerators(("probe",), range(batch)))
        found: list[Tensor] = []

        def solve(evaluator=evaluator, score=score, x=x, probe=probe, found=found) -> None:
            found.append(evaluator.with_probes(score, x, [probe]))

        seconds = timed(solve, 1, device)
        bits[precision] = found[-1].log_prob / (math.prod(score.shape) * math.log(2))
        difference = (bits[precision] - bits["fp32"]).abs().max().item()
        yield {
            "precision": precision,
            "network runs": found[-1].nfe,
            "images/s": batch / seconds,
            "largest difference to fp32, bits/dim": difference,
        }


PARTS = {"training": training, "sampling": sampling, "likelihood": likelihood}


if __name__ == "__main__":
    command(run)
