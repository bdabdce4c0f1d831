"""Flags of the commands: mistakes are answered in one line that names the flag."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

from absl import flags

__all__ = ["available_cores", "parse_counts", "parse_flags"]


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, or exit with one line that names the flag, or the argument that is none: absl and ml_collections answer
    some mistakes with a traceback, and leave other arguments to the program."""
    given = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
    given += [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    for config_file in (value.split(":")[0] for value in given):
        if not os.path.isfile(config_file):
            sys.exit(f"error: --config={config_file}: no such file")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ') if 'Traceback' in str(error) else lines[0]}")
    except (AttributeError, KeyError) as error:
        overrides = ", ".join(a.split("=")[0] for a in argv if a.startswith("--config."))
        # ml_collections puts a suggestion after the name, quoted once more for every exception it passed through.
        reason = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "").strip("\"'").split())
        sys.exit(f"error: {overrides}: the config has no field {reason}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}: every argument is a flag, --name=value")
    return rest


def parse_counts(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    """Distinct integers from 1 on, in increasing order.

    Raises:
        ValueError: no value, or one that is not such an integer.
    """
    counts = set()
    for value in values:
        if not value.strip().isdecimal() or int(value) < 1:
            raise ValueError(f"--{flag}={value}: allowed are integers from 1 on")
        counts.add(int(value))
    if not counts:
        raise ValueError(f"--{flag} is empty: give at least one integer")
    return tuple(sorted(counts))


def available_cores() -> int:
    """How many processes to start where the user does not say: the cores that this one may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)
