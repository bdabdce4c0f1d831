"""The benchmark of samplers, in small."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import run_lib
from benchmarks import sampling as benchmark
from configs.digits import get_config


def test_benchmark_compares_samplers(tmp_path, monkeypatch):
    config, runtime = get_config("u"), run_lib.Runtime(device="cpu")
    config.model.update(nf=8, num_res_blocks=1)
    config.training.update(n_iters=2, batch_size=4, snapshot_sampling=False)
    run_lib.train(config, tmp_path, runtime)
    monkeypatch.setattr(benchmark, "VARIANTS", dict(list(benchmark.VARIANTS.items())[-3:]))
    with pytest.raises(run_lib.InvalidRun, match="--num_samples=39: at least 40"):
        benchmark.compare(config, str(tmp_path), runtime, 39)
    measured = config.copy_and_resolve_references()
    measured.sampling.condition = "inpaint"
    with pytest.raises(run_lib.InvalidRun, match=r"sampling\.condition='inpaint': only for main\.py --mode=sample"):
        benchmark.compare(measured, str(tmp_path), runtime, 40)
    # Compiled is said, and done: of the same network.
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    with_compiler = dataclasses.replace(runtime, compile=True)
    sizes, draw = [], benchmark.draw
    monkeypatch.setattr(benchmark, "draw", lambda run, indices: sizes.append(len(indices)) or draw(run, indices))
    assert ", cpu, fp32, compiled, " in benchmark.compare(config, str(tmp_path), with_compiler, 40)
    assert [type(module).__name__ for module in compiled].count("UNet") == 2  # the network and its average
    assert sizes == [2, 40] + 3 * [2, 40]  # every size of batch once before any is timed
    monkeypatch.setattr(benchmark, "draw", draw)
    *_, first, second, third = benchmark.compare(config, str(tmp_path), runtime, 40).splitlines()
    assert [row.split("|")[2].strip() for row in (first, second, third)] == ["20", "13", "10"]
    assert first.rstrip(" |").endswith("+0.0") and first.split("|")[4].strip() == "1.0"
