"""Train, evaluate or sample a score-based model: python main.py --config=FILE[:ARGUMENT] --workdir=W --mode=MODE."""

from __future__ import annotations

import experiment  # noqa: F401 -- before all else

# isort: split
import json
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
MODES = ["train", "eval", "sample", "stats", "train_classifier", "audit", "export"]
flags.DEFINE_enum(
    "mode", None, MODES, "What to do; stats is for the data's features that FID needs, audit for published models."
)
flags.DEFINE_string("device", "auto", "auto, cpu, cuda or mps.")
flags.DEFINE_string("precision", "tf32", "fp32; tf32, the same but on GPUs that have it; bf16 or fp16 (mixed).")
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
    if FLAGS.checkpoint and FLAGS.mode not in ("eval", "sample", "export"):
        sys.exit(
            "--checkpoint: only for --mode=eval, sample or export; training starts from --config.training.init_from"
        )
    if bool(FLAGS.model) != (FLAGS.mode == "audit"):
        sys.exit("--model: for --mode=audit, which needs it")
    if FLAGS.dry_run and FLAGS.mode != "train":
        sys.exit("--dry_run: only for --mode=train")
    if FLAGS.compile and FLAGS.mode in ("stats", "train_classifier", "audit", "export"):
        sys.exit(f"--compile: not for --mode={FLAGS.mode}, which does not run the score's network")

    import run_lib  # imports torch, which --help and a mistyped flag need not wait for

    runtime = run_lib.Runtime(
        FLAGS.device, FLAGS.precision, FLAGS.accumulation_steps, compile=FLAGS.compile, cache_dir=FLAGS.cache_dir
    )
    run = FLAGS.config, FLAGS.workdir, runtime
    if FLAGS.dry_run:
        _print(run_lib.dry_run(*run))
    elif FLAGS.mode == "train":
        run_lib.train(*run)
    elif FLAGS.mode == "eval":
        _print(run_lib.evaluate(*run, FLAGS.checkpoint))
    elif FLAGS.mode == "train_classifier":
        _print(run_lib.train_classifier(*run))
    elif FLAGS.mode == "export":
        _print(run_lib.export(*run, FLAGS.checkpoint))
    elif FLAGS.mode == "audit":
        from report.audit import audit

        _print(audit(*run, ",".join(FLAGS.model)))
    elif FLAGS.mode == "stats":
        _print(run_lib.statistics(*run))
    else:
        folder = run_lib.sample(*run, FLAGS.checkpoint)
        if (folder / "metrics.json").exists():
            _print(json.loads((folder / "metrics.json").read_text()))
        _print(folder)


def _print(result: object) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if not isinstance(result, dict):
        print(result)
        return
    for name, value in sorted(result.items()):
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    run_main(main)
