"""Train, evaluate or sample a score-based model: python main.py --config=FILE[:ARGUMENT] --workdir=W --mode=MODE."""

from __future__ import annotations

import experiment  # noqa: F401 -- before all else

# isort: split
import json
import logging
import os
import sys

from absl import flags

from experiment.command_line import define_config, run_main

FLAGS = flags.FLAGS

define_config(
    "The experiment, by default that of the run in --workdir or model in --checkpoint; override: --config.x.y=VALUE.",
    in_workdir=True,
)
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.")
MODES = ["train", "eval", "sample", "score", "stats", "train_classifier", "audit", "export"]
flags.DEFINE_enum(
    "mode",
    None,
    MODES,
    "What to do; score writes a row per test item, stats the data's features that FID needs, audit is for published "
    "models.",
)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda or mps.")
flags.DEFINE_string("precision", "tf32", "fp32; tf32, the same but on GPUs that have it; bf16 or fp16 (mixed).")
flags.DEFINE_integer("threads", 0, "Of a CPU; 0: as many as cores are free, or as OMP_NUM_THREADS says.")
flags.DEFINE_bool("compile", False, "Have training and samplers run a compiled network (torch.compile).")
flags.DEFINE_bool("dry_run", False, "Do a few steps of training, say what time and memory they take, and keep nothing.")
flags.DEFINE_integer("accumulation_steps", 1, "Split each process's share of a batch into so many passes.")
flags.DEFINE_string("checkpoint", None, "What to evaluate, sample from or export; default: the newest in the workdir.")
flags.DEFINE_list(
    "model", [], "With --mode=audit: runs, files, folders and names of models, the first to compare with."
)
flags.DEFINE_string("cache_dir", "", "Where eval and stats keep features of the data, which several runs can share.")
flags.mark_flags_as_required(["workdir", "mode"])


def main(argv: list[str]) -> None:
    if FLAGS.checkpoint and FLAGS.mode not in ("eval", "sample", "score", "export"):
        sys.exit(
            "--checkpoint: only for --mode=eval, sample, score or export; training starts from "
            "--config.training.init_from"
        )
    if bool(FLAGS.model) != (FLAGS.mode == "audit"):
        sys.exit("--model: for --mode=audit, which needs it")
    if FLAGS.dry_run and FLAGS.mode != "train":
        sys.exit("--dry_run: only for --mode=train")
    if FLAGS.compile and FLAGS.mode in ("stats", "train_classifier", "audit", "export"):
        sys.exit(f"--compile: not for --mode={FLAGS.mode}, which does not run the score's network")

    import run_lib  # imports torch, which --help and a mistyped flag need not wait for

    runtime = run_lib.Runtime(
        FLAGS.device,
        FLAGS.precision,
        FLAGS.accumulation_steps,
        compile=FLAGS.compile,
        cache_dir=FLAGS.cache_dir,
        threads=FLAGS.threads,
    )
    run = FLAGS.config, FLAGS.workdir, runtime
    written, then = FLAGS.workdir, "--mode=eval"
    if FLAGS.dry_run:
        _print(run_lib.dry_run(*run))
        written, then = "nothing; the same command without --dry_run trains", None
    elif FLAGS.mode == "train":
        run_lib.train(*run)
        written += "/checkpoints"
    elif FLAGS.mode == "eval":
        _print(run_lib.evaluate(*run, FLAGS.checkpoint))
        written, then = f"{written}/eval", ""
    elif FLAGS.mode == "score":
        written, then = run_lib.score(*run, FLAGS.checkpoint), None
        _print(written)
    elif FLAGS.mode == "train_classifier":
        _print(run_lib.train_classifier(*run))
        written, then = f"{written}/classifier", "--mode=sample --config.sampling.condition=class"
    elif FLAGS.mode == "export":
        written, then = run_lib.export(*run, FLAGS.checkpoint), None
        _print(written)
    elif FLAGS.mode == "audit":
        from report.audit import audit

        _print(audit(*run, ",".join(FLAGS.model)))
        then = None
    elif FLAGS.mode == "stats":
        written = run_lib.statistics(*run)
        _print(written)
        then += f" --cache_dir={FLAGS.cache_dir}" if FLAGS.cache_dir else ""
    else:
        written = folder = run_lib.sample(*run, FLAGS.checkpoint)
        if (folder / "metrics.json").exists():
            _print(json.loads((folder / "metrics.json").read_text()))
        _print(folder)
    if then and FLAGS.checkpoint:  # W has no config of its own then
        then += f" --checkpoint={FLAGS.checkpoint}"
    command = f"main.py --workdir={FLAGS.workdir} {then}" if then else f"-m report.main {FLAGS.workdir}"
    logging.info("written: %s%s", written, "" if then is None else f"; next: python {command}")


def _print(result: object) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if not isinstance(result, dict):
        print(result, flush=True)
        return
    for name, value in sorted(result.items()):
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}", flush=True)


if __name__ == "__main__":
    run_main(main)
