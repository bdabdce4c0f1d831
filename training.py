"""Resumable optimisation of a small model: the training loop of the examples that need no more than one device.

(Image models are trained by ``run_lib``, which adds data files, moving averages, several processes, mixed precision.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import CheckpointStore, load_state_dict_strictly
from experiment.metrics_log import MetricsLog

__all__ = ["fit"]


def fit(
    module: nn.Module,
    loss: Callable[[int], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    directory: Path,
    *,
    n_iters: int,
    grad_clip: float = math.inf,
    log_freq: int = 100,
    save_freq: int = 500,
    observe: Callable[[], Mapping[str, float]] | None = None,
    update: Callable[[int], object] = lambda steps: None,
) -> None:
    """Minimise ``loss`` over the parameters of ``module`` for ``n_iters`` steps in all.

    Killed at any moment and called again, it continues from its newest checkpoint to the very same weights and log,
    provided that ``loss`` depends on nothing but the parameters and the step (randomness keyed by the step).

    Args:
        module: what is trained, with its weights at step 0, on its device.
        loss: step → terms, among them ``loss``, the scalar to minimise; all of them are logged, and ``grad_norm``.
        optimizer: of the module's parameters.
        directory: gets ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``.
        n_iters: steps in all; nothing is done if they have been done.
        grad_clip: largest norm of the gradient; a larger one is scaled down to it.
        log_freq: steps between rows of the log; a row holds the terms' means over the steps since the row before.
        save_freq: steps between checkpoints.
        observe: further quantities of the present weights, logged with every row, and at step 0 before the first.
        update: called with the number of steps just done, for a progress bar; first with those resumed from.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the last checkpoint is good.
        CheckpointError: no checkpoint can be read, or they belong to another module.
    """
    store = CheckpointStore(directory / "checkpoints", keep=1, milestone_every=0)
    step, sums = 0, {}
    state = store.load_latest()
    if state is not None:
        load_state_dict_strictly(module, state["model"], store.path(state["step"]))
        optimizer.load_state_dict(state["optimizer"])
        step, sums = state["step"], state["sums"]
        update(step)
    if step >= n_iters:
        return
    # A start from nothing also drops the row of step 0 that an attempt without a checkpoint has left.
    with MetricsLog(directory, step if state is not None else -1) as log:
        if step == 0 and observe is not None:
            log.write(0, observe())
        while step < n_iters:
            optimizer.zero_grad()
            terms = loss(step)
            terms["loss"].backward()
            grad_norm = nn.utils.clip_grad_norm_(module.parameters(), grad_clip)
            optimizer.step()
            step += 1
            update(1)
            for name, value in {**terms, "grad_norm": grad_norm}.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = [total + value.detach(), count + 1]
            due = step == n_iters or step % save_freq == 0
            if step % log_freq == 0 or due:
                # A value that was not finite in any step leaves its mark in the sum.
                sums = {name: [float(total), count] for name, (total, count) in sums.items()}
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(sums[name][0]):
                        raise FloatingPointError(
                            f"{name} is not finite at or before step {step}; try a smaller learning rate"
                        )
            if step % log_freq == 0 or step == n_iters:
                row = {name: total / count for name, (total, count) in sums.items()}
                log.write(step, row | dict(observe() if observe is not None else {}))
                sums = {}
            if due:
                state = {
                    "step": step,
                    "model": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "sums": sums,
                }
                log.sync()
                store.save(state, step)
