"""A training step: score matching (U) and the quasi-conservative term, ours and the public code's, in turn.

python -m benchmarks.training_step [--device=cpu] [--precision=fp32] [--compile] [--repeats=10]

A step is loss, backward pass, clipping of the gradient, Adam, and moving average. The size of the network is that for
which the figures are required: NCSN++ of base width 32 with 2 blocks per level and attention at 16×16, 3×32×32 images,
a batch of 8, on two threads. ``paper`` is our implementation of what the public code does (benchmarks/public_code.py).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from absl import app, flags

from experiment.command_line import parse_flags

if TYPE_CHECKING:
    import torch
    from torch import Tensor

U, PAPER_U, BF16 = "U", "U, paper", "U, bf16"
COMPILED_U, COMPILED_BF16, COMPILED_QC = "U, compiled", "U, bf16, compiled", "QC, K = 1, compiled"


class Variant(NamedTuple):
    """What is timed: overrides of the config, probes of the paper's form (None: ours), bf16, steps to average over, and
    whether it is compiled."""

    overrides: dict
    paper_probes: int | None = None
    bf16: bool = False
    steps: int = 1
    compiled: bool = False


def _qc(**fields) -> dict:
    return {"training.qc_weight": 1e-4} | {f"training.{name}": value for name, value in fields.items()}


VARIANTS = {
    U: Variant({}),
    PAPER_U: Variant({}, paper_probes=0),
    BF16: Variant({}, bf16=True),
    "QC, K = 1, paper": Variant(_qc(), paper_probes=1),
    "QC, K = 1": Variant(_qc()),
    "QC, K = 1, trace": Variant(_qc(qc_estimator="trace")),
    "QC, K = 4, paper": Variant(_qc(), paper_probes=4),
    "QC, K = 4, all at once": Variant(_qc(qc_probes=4, qc_probe_chunk=4)),
    "QC, K = 4, chunks of 1": Variant(_qc(qc_probes=4)),
    "QC, K = 1, every 4th step": Variant(_qc(qc_interval=4), steps=4),
    "QC, K = 1, every 4th sample": Variant(_qc(qc_stride=4)),
    "QC, K = 1, every 4th step, bf16": Variant(_qc(qc_interval=4), steps=4, bf16=True),
}
# With --compile, beside the others: compiling takes minutes on a CPU.
COMPILED = {
    COMPILED_U: Variant({}, compiled=True),
    COMPILED_BF16: Variant({}, bf16=True, compiled=True),
    COMPILED_QC: Variant(_qc(), compiled=True),
    "QC, K = 1, every 4th step, compiled": Variant(_qc(qc_interval=4), steps=4, compiled=True),
}

# Figure: numerator, denominator, and what is required of their ratio.
REQUIRED = {
    "QC step / U step, K = 1": ("QC, K = 1", U, "≤ 3.3"),
    "QC step / U step, K = 4": ("QC, K = 4, all at once", U, "≤ 10"),
    "mean QC step with qc_interval 4 / U step": ("QC, K = 1, every 4th step", U, "≤ 1.7"),
    "U step, paper / ours": (PAPER_U, U, "≥ 1.15"),
    "U step, bf16 / float32": (BF16, U, "≤ 0.65"),
    "U step, compiled / not": (COMPILED_U, U, ""),
    "QC step, K = 1, compiled / not": (COMPILED_QC, "QC, K = 1", ""),
    "U step, bf16 and compiled / float32": (COMPILED_BF16, U, ""),
    "U step, bf16 / float32, both compiled": (COMPILED_BF16, COMPILED_U, ""),
    "paper's QC step / paper's U step, K = 1": ("QC, K = 1, paper", PAPER_U, ""),
    "paper's QC step / paper's U step, K = 4": ("QC, K = 4, paper", PAPER_U, ""),
    "QC step, paper / ours, K = 1": ("QC, K = 1, paper", "QC, K = 1", ""),
    "QC step, paper / ours, K = 4": ("QC, K = 4, paper", "QC, K = 4, all at once", ""),
}


def build(variant: Variant, given: dict, device: torch.device) -> Callable[[int], None]:
    """The step of a variant, as a function of its number.

    Args:
        variant: of ``VARIANTS`` or ``COMPILED``.
        given: nf, num_res_blocks, batch_size and precision (fp32 or bf16).
        device: where it is computed.
    """
    import torch

    from benchmarks.public_code import PublicEMA, in_public_style, public_step
    from configs.defaults import base_config
    from losses import get_objective
    from models import EMA, create_score_model
    from sde_lib import get_sde

    config = base_config()
    config.model.update(nf=given["nf"], num_res_blocks=given["num_res_blocks"])
    config.update_from_flattened_dict(variant.overrides)
    torch.manual_seed(0)
    model = create_score_model(config, get_sde(config)).to(device)
    optim, paper = config.optim, variant.paper_probes is not None
    if paper:
        model = in_public_style(model)
    objective = get_objective(config, model).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=optim.lr, betas=(optim.beta1, 0.999), eps=optim.eps, weight_decay=optim.weight_decay)
    optimizer = torch.optim.Adam(parameters, **settings, **({} if paper else {"fused": True}))
    ema = (PublicEMA if paper else EMA)(model, config.model.ema_rate)
    x0 = torch.rand(given["batch_size"], *model.network.image_shape, generator=torch.Generator().manual_seed(0))
    x0 = x0.to(device)
    bf16 = variant.bf16 or given["precision"] == "bf16"
    if variant.compiled:
        model.compile_network()
        objective.compile_products()

    def gradient(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            if paper:
                public_step(objective, x0, generator, probes=variant.paper_probes)
                return
            loss = objective(x0, generator, step=step)["loss"]
        loss.backward()

    def take(step: int) -> None:
        optimizer.zero_grad()
        gradient(step)
        torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip)
        optimizer.step()
        ema.update(model)

    return take


def measure(
    steps: dict[str, Callable[[int], None]], variants: dict[str, Variant], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per step of every variant, one after the other in each of ``repeats`` rounds, after one that does not
    count, by the clock of ``benchmarks.clock``."""
    from tqdm import trange

    from benchmarks.clock import clock_of

    clock, _ = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in trange(repeats + 1, unit="round"):
        for name, take in steps.items():
            count = variants[name].steps
            started = clock()
            for step in range(count * repeat, count * (repeat + 1)):
                take(step)
            if repeat:
                times[name].append((clock() - started) / count)
    return times


def operations_of(work: Callable[[], object]) -> float:
    """Floating-point operations of the convolutions and matrix products in ``work``; a product with its sum is two."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    total = 0.0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
            nonlocal total
            result = function(*args, **(kwargs or {}))
            if count := flop_registry.get(function.overloadpacket):
                total += count(*args, **(kwargs or {}), out_val=result)
            return result

    with Counter():
        work()
    return total


def operations_of_step(variant: Variant, given: dict, device: torch.device) -> float:
    take = build(variant._replace(compiled=False), given, device)
    return operations_of(lambda: [take(step) for step in range(variant.steps)]) / variant.steps


def operations_of_passes(given: dict, device: torch.device) -> dict[str, float]:
    """Operations of each pass over the network by itself."""
    import torch

    from configs.defaults import base_config
    from models import create_score_model
    from models.second_order.operations import gradients_of
    from sde_lib import get_sde

    config = base_config()
    config.model.update(nf=given["nf"], num_res_blocks=given["num_res_blocks"])
    model = create_score_model(config, get_sde(config)).to(device)
    x = torch.rand(given["batch_size"], *model.network.image_shape, device=device, requires_grad=True)
    t, found, results = torch.full((len(x),), 0.5, device=device), {}, {}

    def grad(of: Tensor, at: Tensor, cotangent: Tensor, what: str) -> Tensor:
        with gradients_of(what):
            return torch.autograd.grad(of, at, cotangent, retain_graph=True, create_graph=True)[0]

    u, v = torch.ones_like(x).requires_grad_(), torch.ones_like(x)
    for name, work in {
        "forward, F": lambda: model(x, t),
        "Jᵀu, by a backward pass": lambda: grad(results["forward, F"], x, u, "inputs"),
        "Jv, by differentiating Jᵀu": lambda: grad(results["Jᵀu, by a backward pass"], u, v, "cotangents"),
        "backward, score matching alone": lambda: (results["forward, F"] ** 2).sum().backward(retain_graph=True),
        "backward, with the QC term": lambda: sum(
            (result**2).sum() for result in list(results.values())[:3]
        ).backward(),
    }.items():
        found[name] = operations_of(lambda name=name, work=work: results.update({name: work()}))
    return found


def tables(times: dict[str, list[float]], operations: dict[str, float], passes: dict[str, float]) -> str:
    """Markdown: the steps, the figures required, and the operations of single passes."""
    seconds = {name: statistics.median(values) for name, values in times.items()}

    def over(numerator: str, denominator: str, of: dict[str, float]) -> float:
        return of[numerator] / of[denominator]

    lines = [
        "| step | ms | of U | GFLOP | of U | GFLOP/s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {1e3 * seconds[name]:.0f} | {over(name, U, seconds):.2f} | {operations[name] / 1e9:.1f} | "
            f"{over(name, U, operations):.2f} | {operations[name] / 1e9 / seconds[name]:.0f} |"
            for name in times
        ),
        "",
        "| figure | required | measured | by operations alone |",
        "|---|---|---|---|",
        *(
            f"| {figure} | {required} | {over(a, b, seconds):.2f} | {over(a, b, operations):.2f} |"
            for figure, (a, b, required) in REQUIRED.items()
            if a in times and b in times
        ),
        "",
        "| pass | GFLOP | in F |",
        "|---|---|---|",
        *(f"| {name} | {count / 1e9:.2f} | {count / passes['forward, F']:.2f} |" for name, count in passes.items()),
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    flag = flags.FLAGS
    for name in ("nf", "num_res_blocks", "batch_size", "repeats", "threads"):
        if flag[name].value < 1:
            sys.exit(f"error: --{name}={flag[name].value}: at least 1")
    if flag.batch_size % 4:
        sys.exit(f"error: --batch_size={flag.batch_size}: a multiple of 4, for the term on every 4th sample")
    known = VARIANTS | (COMPILED if flag.compile else {})
    chosen = {name: v for name, v in known.items() if not flag.variants or name in (U, *flag.variants)}
    if unknown := set(flag.variants) - set(known):
        sys.exit(f"error: --variants={unknown.pop()}: allowed are {'; '.join(known)}")

    import torch
    from run_setup import Runtime, check_compile

    from experiment.runtime import keep_freed_memory

    torch.set_num_threads(flag.threads)
    try:
        device = Runtime(flag.device).accelerator().device
        if flag.compile:
            check_compile(device, "unconstrained")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    given = {name: flag[name].value for name in ("nf", "num_res_blocks", "batch_size", "precision")}
    steps = {name: build(variant, given, device) for name, variant in chosen.items()}
    times = measure(steps, chosen, flag.repeats, device)
    operations = {name: operations_of_step(variant, given, device) for name, variant in chosen.items()}
    print(
        f"NCSN++, 3x32x32, nf {flag.nf}, {flag.num_res_blocks} blocks, batch {flag.batch_size}, {device}, "
        f"{torch.get_num_threads()} thread(s), {flag.precision}, "
        f"torch {torch.__version__}, median of {flag.repeats}\n"
    )
    print(tables(times, operations, operations_of_passes(given, device)))


if __name__ == "__main__":
    flags.DEFINE_integer("nf", 32, "Width of the network.")
    flags.DEFINE_integer("num_res_blocks", 2, "Residual blocks per level.")
    flags.DEFINE_integer("batch_size", 8, "Images.")
    flags.DEFINE_integer("threads", 2, "Of the CPU.")
    flags.DEFINE_integer("repeats", 10, "Rounds; the medians are printed.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_enum("precision", "fp32", ["fp32", "bf16"], "Of every variant of ours, and of the paper's.")
    flags.DEFINE_boolean("compile", False, "Time steps of a compiled network, too.")
    flags.DEFINE_multi_string("variants", [], "Of the steps, beside U; may be given several times. Empty: all.")
    app.run(main, flags_parser=parse_flags)
