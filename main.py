"""Train, evaluate or sample a score-based model: python main.py --config=FILE[:ARGUMENT] --workdir=W --mode=MODE."""

from __future__ import annotations

import json
import logging
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from experiment.command_line import parse_flags

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "The experiment; override fields with --config.x.y=VALUE.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.")
MODES = ["train", "eval", "sample", "stats", "train_classifier"]
flags.DEFINE_enum("mode", None, MODES, "What to do; stats is for the data's features that FID needs.")
flags.DEFINE_string("device", "auto", "auto, cpu, cuda or mps.")
flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16 (mixed).")
flags.DEFINE_bool("compile", False, "Have training and samplers run a compiled network (torch.compile).")
flags.DEFINE_integer("accumulation_steps", 1, "Split each process's share of a batch into so many passes.")
flags.DEFINE_string("checkpoint", None, "File to evaluate or sample from; default: the newest in the workdir.")
flags.DEFINE_string("cache_dir", "", "Where eval and stats keep features of the data, which several runs can share.")
flags.mark_flags_as_required(["config", "workdir", "mode"])


def main(argv: list[str]) -> None:
    if FLAGS.checkpoint and FLAGS.mode not in ("eval", "sample"):
        sys.exit("--checkpoint: only for --mode=eval or sample; training starts from --config.training.init_from")
    if FLAGS.compile and FLAGS.mode in ("stats", "train_classifier"):
        sys.exit(f"--compile: not for --mode={FLAGS.mode}, which does not run the score's network")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import run_lib  # imports torch, which --help and a mistyped flag need not wait for
    from data import UnreadableImage

    try:
        runtime = run_lib.Runtime(
            FLAGS.device, FLAGS.precision, FLAGS.accumulation_steps, compile=FLAGS.compile, cache_dir=FLAGS.cache_dir
        )
        if FLAGS.mode == "train":
            run_lib.train(FLAGS.config, FLAGS.workdir, runtime)
        elif FLAGS.mode == "eval":
            _print(run_lib.evaluate(FLAGS.config, FLAGS.workdir, runtime, FLAGS.checkpoint))
        elif FLAGS.mode == "train_classifier":
            _print(run_lib.train_classifier(FLAGS.config, FLAGS.workdir, runtime))
        elif FLAGS.mode == "stats":
            path = run_lib.statistics(FLAGS.config, FLAGS.workdir, runtime)
            if _is_main_process():
                print(path)
        else:
            folder = run_lib.sample(FLAGS.config, FLAGS.workdir, runtime, FLAGS.checkpoint)
            if _is_main_process():
                _print(json.loads((folder / "metrics.json").read_text()))
                print(folder)
    except (run_lib.InvalidRun, FloatingPointError, UnreadableImage, OSError) as error:
        sys.exit(f"error: {error}")
    except run_lib.Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:  # in evaluation and sampling, which keep every finished batch, or the classifier's steps
        sys.exit("stopped; the same command resumes")


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print(metrics: dict) -> None:
    if _is_main_process():
        for name, value in sorted(metrics.items()):
            print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
