"""Commands: flags, and mistakes that are answered in one line.

A command is a function ``run(workdir, *, jobs=2, …)``. ``command(run)`` makes a flag of every argument, with its
default and the description in its docstring, and calls it:

    if __name__ == "__main__":
        command(run)
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from configs import stored
from configs.fields import flatten
from configs.public import PUBLIC, refusal

_ARGUMENTS: list[str] = []
"""What the overrides of the config are taken from, once the flags are parsed."""

_config_in_workdir = False

flags.disclaim_key_flags()  # they belong to the program that defines them, whose --help lists them


def command(run: Callable[..., object]) -> None:
    """Run a function as a program; what it returns is printed, unless it is None.

    An argument without a default must be given, ``config`` names a config file. A default of type bool, int, float or
    str sets the type of the flag; a tuple is a list separated by commas, of the type of its elements. Arguments that
    are positional only, or *arguments, are words of the command line instead of flags.
    """
    descriptions, signature = _descriptions(run), inspect.signature(run)
    as_words = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    named = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in as_words}
    for name, parameter in named.items():
        default, text = parameter.default, descriptions.get(name, "")
        required = default is inspect.Parameter.empty
        if name == "config":
            define_config(text, required)
        elif required:
            flags.DEFINE_string(name, None, text, required=True)
        elif isinstance(default, tuple):
            flags.DEFINE_list(name, [f"{x:g}" if isinstance(x, float) else str(x) for x in default], text)
        else:
            define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
            define.get(type(default), flags.DEFINE_string)(name, default, text)

    def main(argv: list[str]) -> None:
        from experiment.runtime import Runtime  # with torch, which main.py's flags need not wait for

        given = {name: _value(name, parameter.default) for name, parameter in named.items()}
        try:
            bound = signature.bind(*argv[1:], **given)
        except TypeError as error:
            raise ValueError(f"{error}") from None
        where = (
            f"{given['jobs']} process(es) of one thread"
            if "jobs" in given
            else Runtime(given.get("device", "cpu")).where
        )
        folder = Path(given.get("workdir") or given.get("output") or "")
        about = (run.__globals__["__doc__"] or "").partition("\n")[0]
        logging.info("%s\non %s%s", about, where, f"; writes to {folder}" if folder.name else "")
        started = time.time()
        if (result := run(*bound.args, **bound.kwargs)) is not None:
            print(result, flush=True)
        if folder.name:
            new = [path.name for path in folder.glob("[!.]*") if path.is_file() and path.stat().st_mtime >= started - 1]
            logging.info("written to %s: %s", folder, ", ".join(sorted(new)) or "nothing that was not there")

    run_main(main, words=len(named) < len(signature.parameters))


def define_config(text: str = "", required: bool = True, in_workdir: bool = False) -> None:
    """Define the flag --config, and those of the fields of the config that it names; ``in_workdir``: by default it is
    that of the run in --workdir."""
    global _config_in_workdir
    _config_in_workdir = in_workdir
    text = text or "The experiment; override fields with --config.x.y=VALUE."
    config_flags.DEFINE_config_file("config", None, text, sys_argv=_ARGUMENTS)
    if required:
        flags.mark_flag_as_required("config")


def run_main(main: Callable[[list[str]], None], words: bool = False) -> None:
    """Parse the flags that are defined and call ``main``. Bad input, files that cannot be used, and interruptions end
    the program with one line on standard error.

    ``words``: whether the program takes arguments that are no flags.
    """

    interrupted = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    def guarded(argv: list[str]) -> None:
        signal.signal(signal.SIGINT, interrupt)
        # --verbosity=1 also shows where an error happened. Of several processes the first reports.
        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
        logging.getLogger().setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else level)
        absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("matplotlib").setLevel(logging.WARNING)
        if "workdir" in flags.FLAGS and not flags.FLAGS.workdir.strip():  # it would be the current folder
            sys.exit("error: --workdir is empty: give a folder")
        try:
            main(argv)
        except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
            logging.getLogger(__name__).debug("where it happened:", exc_info=True)
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped; the same command resumes")
        except Exception as error:
            if interrupted:  # modules in C turn it into errors of their own
                sys.exit("stopped; the same command resumes")
            text = " ".join(f"{type(error).__name__}: {error}".split())
            if re.search("MemoryError|allocate|out of memory|bad_alloc", text):
                sys.exit(f"error: not enough memory for what is computed at once: {text}")
            if (number := getattr(error, "signal_number", None)) is None:
                raise
            print(error, file=sys.stderr)
            sys.exit(128 + number)

    app.run(guarded, flags_parser=partial(parse_flags, words=words))


def _descriptions(run: Callable) -> dict[str, str]:
    """The arguments in the section Args of a docstring."""
    section = re.search(r"\n *Args:\n(.*?)(?:\n\n|\n *(?:Returns|Raises):|\Z)", run.__doc__ or "", re.DOTALL)
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _value(flag: str, default: object) -> object:
    """That of a flag; a list is converted to the type of the default's elements."""
    value = flags.FLAGS[flag].value
    if not isinstance(default, tuple):
        return value
    kind = type(default[0])
    try:
        return tuple(map(kind, value))
    except ValueError:
        allowed = "integers" if kind is int else "numbers"
        raise ValueError(f"--{flag}={','.join(value)}: allowed are {allowed}, separated by commas") from None


def parse_flags(argv: list[str], words: bool = False) -> list[str]:
    """Parse, or exit with one line that names the flag, or the argument that is none: absl and ml_collections answer
    some mistakes with a traceback, and leave other arguments to the program."""
    if words:
        flags.FLAGS.set_gnu_getopt(True)  # flags may come after words
    try:
        argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
        public = {}
        if "config" in flags.FLAGS:
            argv = _config_first(argv)
            public = _take_public_overrides(argv)
        _ARGUMENTS[:] = argv
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines[0].startswith("flag --config=None"):
            also = ", and in --workdir there is no run whose config could be taken" if _config_in_workdir else ""
            sys.exit(f"error: --config=FILE is missing{also}")
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ') if 'Traceback' in str(error) else lines[0]}")
    for name, value in public.items():
        if refused := refusal(name, value, flatten(flags.FLAGS.config.to_dict())):
            sys.exit(f"error: {refused}")
    if len(rest) > 1 and not words:
        sys.exit(f"error: unexpected argument {rest[1]!r}: every argument is a flag, --name=value")
    return rest


def _config_first(argv: list[str]) -> list[str]:
    """The arguments with --config before its overrides, as ml_collections needs it; without one, that of the run in
    --workdir, or of the exported model that --checkpoint names."""
    configs, first = _values(argv, "config"), []
    if configs:
        first, rest = [f"--config={configs[-1][1]}"], [*argv]
        for i, _ in reversed(configs):  # the last one counts
            del rest[i : i + (1 if "=" in argv[i] else 2)]
        return [rest[0], *first, *rest[1:]]
    # In the folder of an exported model there are its weights; in others the file may be another program's.
    for flag, beside in (("checkpoint", "model.safetensors"), ("workdir", "")) if _config_in_workdir else ():
        folder = _values(argv, flag)[-1:]
        path = Path(folder[0][1] if folder else "") / "config.json"
        if folder and folder[0][1] and path.is_file() and (path.parent / beside).exists():
            first = [f"--config={stored.__file__}:{path}"]
    return [argv[0], *first, *argv[1:]]


def _values(argv: list[str], flag: str) -> list[tuple[int, str]]:
    """Where a flag is given, --flag=VALUE or --flag VALUE, and its values."""
    places = [i for i, a in enumerate(argv) if i and re.fullmatch(rf"--?{flag}(=.*)?", a, re.DOTALL)]
    return [(i, argv[i].partition("=")[2] if "=" in argv[i] else "".join(argv[i + 1 : i + 2])) for i in places]


def _take_public_overrides(argv: list[str]) -> dict[str, str]:
    """Remove from the arguments the overrides of fields that only the public configs have, and return them; exit with
    one line if there is no config, or nowhere such a field."""
    config = next((_read_config(value) for _, value in _values(argv, "config")), None)
    known, public = flatten(config.to_dict()) if config is not None else {}, {}
    for i, value in reversed(_values(argv, r"(?:no)?config\.[^=]*")):
        name = argv[i].partition("=")[0].partition("config.")[2]
        if name in known:
            continue
        if config is None:
            sys.exit(f"error: --config.{name}: needs --config=FILE")
        if name not in PUBLIC:
            near = "".join(f"; did you mean {field}?" for field in difflib.get_close_matches(name, known, 1))
            sys.exit(f"error: --config.{name}: the config has no field {name!r}{near}")
        public.setdefault(name, value)  # the last one given
        del argv[i : i + (1 if "=" in argv[i] else 2)]
    return public


def _read_config(value: str) -> ConfigDict:
    """The config that ``--config=FILE[:ARGUMENT]`` names, without overrides, or exit with one line."""
    path, *arguments = value.split(":", 1)
    if not os.path.isfile(path):
        sys.exit(f"error: --config={path}: no such file")
    try:
        config = runpy.run_path(path)["get_config"](*arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # whatever a file can do
        sys.exit(f"error: --config={path}: is no config: {type(error).__name__}: {' '.join(str(error).split())}")
    if not isinstance(config, ConfigDict):
        sys.exit(f"error: --config={path}: is no config: its get_config returns no ConfigDict")
    return config


def check_positive(**given: int) -> None:
    """Raise a ValueError that names the first of some flags which is below 1."""
    for flag, value in given.items():
        if value < 1:
            raise ValueError(f"--{flag}={value}: at least 1")


def available_cores() -> int:
    """How many processes to start where the user does not say: the cores that this one may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)
