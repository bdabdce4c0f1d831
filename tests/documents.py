"""What a document promises: its commands, flags, configs, files and links, and whether they exist.

A command is a line of a fenced block, or a code span, that starts with one of ``PROGRAMS``. It is checked by the
program itself, which reads its command line in this process and stops there: flags, their values, and the fields of
the config are then what the program says they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags
from from_config import create_score_model, get_likelihood, get_objective, get_sampler, get_sde
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "accelerate", "make", "srun")
ELLIPSIS = "…"  # stands for the flags that a sentence leaves out
STAND_INS = ("--config=configs/digits.py", "--workdir=runs/x", "--mode=train")

# ------------------------------------------------------------------------------------------------------------- reading


def code_blocks(text: str) -> Iterator[str]:
    """Fenced blocks of shell, or of no language."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        if language in ("", "sh", "bash", "shell", "console"):
            yield block


def code_spans(text: str) -> Iterator[str]:
    """Inline code; a span that a line break divides is one line again."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        yield " ".join(span.split())


def shell_commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a piece of shell. A loop is read with the first of its values; what only the shell
    knows, variables and substitutions, becomes 1."""
    values: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        first = next((word for word in line.split() if not re.match(r"\w+=", word)), "")
        if first not in (*PROGRAMS, "for"):  # anything else: output, sentences, what is no program of ours
            continue
        lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "1", line), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        tokens: list[str] = []
        for token in [*lexer, ";"]:
            if not re.fullmatch("[;&|]+", token):
                tokens.append(re.sub(r"\$\{?(\w+)\}?", lambda name: values.get(name[1], "1"), token))
                continue
            if tokens[:1] == ["for"]:
                values[tokens[1]] = tokens[3]
            words = [token for token in tokens if token != "do"]
            while words and re.match(r"\w+=", words[0]):  # variables of the command's environment
                words.pop(0)
            if len(words) > 1 and words[0] in PROGRAMS:
                yield words
            tokens = []


def commands(text: str) -> list[list[str]]:
    """All commands of a Markdown document, in order of appearance within blocks, then within sentences."""
    found = [command for block in code_blocks(text) for command in shell_commands(block)]
    return found + [command for span in code_spans(text) for command in shell_commands(span)]


# ------------------------------------------------------------------------------------------------------------- running


class Parsed(Exception):
    """A program has read its command line: ``values`` of its flags."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values


def run_program(arguments: Sequence[str], *, only_parse: bool) -> dict[str, Any]:
    """Run ``python ARGUMENTS`` in this process, or only let it parse its command line.

    Returns:
        The flags' values if only parsed, else {}.

    Raises:
        SystemExit: what the program itself ends with on an error.
    """
    known = set(flags.FLAGS)
    parse_args = argparse.ArgumentParser.parse_args

    def run(main: Callable, argv: None = None, flags_parser: Callable = flags.FLAGS) -> None:
        rest = flags_parser(sys.argv)
        if only_parse:
            raise Parsed({name: flags.FLAGS[name].value for name in set(flags.FLAGS) - known})
        main(rest)

    def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        values = parse_args(parser, args, namespace)
        if only_parse:
            raise Parsed(vars(values))
        return values

    module = arguments[0] == "-m"
    argv = [*arguments[1:]] if module else [*arguments]
    try:
        with (
            mock.patch.object(app, "run", run),
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
            mock.patch.object(sys, "argv", argv),
            warnings.catch_warnings(),
        ):
            # A module that another test has imported already is run all the same.
            warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
            if module:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except Parsed as parsed:
        return parsed.values
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return {}


# ------------------------------------------------------------------------------------------------------------ checking


def python_arguments(command: Sequence[str]) -> list[str] | None:
    """What a command makes Python run (``[FILE or -m, …]``), whatever launches it; None for make.

    Raises:
        SystemExit: the launcher does not know a flag.
    """
    program, *arguments = command
    if program == "srun":
        return python_arguments(command[next(i for i, word in enumerate(command) if i and word in PROGRAMS) :])
    if program == "make":
        return None
    if program == "torchrun" or arguments[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments if program == "torchrun" else arguments[2:])
        return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        if arguments[0] != "launch":
            return ["-m", "accelerate"]
        parsed = launch_command_parser().parse_args(arguments[1:])
        return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]
    return arguments


def is_ours(arguments: Sequence[str]) -> bool:
    """Whether a program is of this repository, and not pip, pytest or the like."""
    name = arguments[1].split(".")[0] if arguments[0] == "-m" else arguments[0]
    return arguments[0] != "-m" or (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def complete(arguments: Sequence[str]) -> list[str]:
    """A command without its ellipsis; main.py then gets the flags that it cannot do without."""
    words = [word for word in arguments if word != ELLIPSIS]
    if len(words) < len(arguments) and words[0] == "main.py":
        words[1:1] = [flag for flag in STAND_INS if not any(w.startswith(flag.split("=")[0] + "=") for w in words)]
    return words


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))


def command_problem(command: Sequence[str]) -> str | None:
    """What is wrong with a command; None if it would start."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if command[0] == "make":
                targets = [word for word in command[1:] if "=" not in word and not word.startswith("-")]
                unknown = set(targets) - make_targets()
                return f"no such target: {', '.join(sorted(unknown))}" if unknown else None
            arguments = python_arguments(command)
            if not is_ours(arguments):
                return None
            if arguments[0] != "-m" and not (ROOT / arguments[0]).is_file():
                return f"no such file: {arguments[0]}"
            run_program(complete(arguments), only_parse=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, str) else errors.getvalue().strip().splitlines()[-1]
    except ImportError as error:
        return str(error)
    return None


def flags_problem(words: Sequence[str], programs: Sequence[Sequence[str]], *, build: bool = True) -> str | None:
    """What is wrong with flags that a sentence mentions; None if one of the programs takes them.

    A flag without a value, or with a capital letter that stands for one, must exist; the others must be acceptable,
    those of a config also to what is built from it.
    """
    bare = [word for word in words if re.fullmatch(r"--[\w.]+(=[A-Z]?)?", word)]
    answers = []
    for program in programs:
        given = [word for word in words if word not in bare]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                values = run_program([*program, *given], only_parse=True)
        except SystemExit as end:
            answers.append(str(end.code))
            continue
        unknown = [word for word in bare if not _has_flag(values, word.lstrip("-").split("=")[0])]
        if unknown:
            answers.append(f"no such flag: {', '.join(unknown)}")
        elif program[0] == "main.py" and build and (problem := config_value_problem(values["config"])):
            answers.append(problem)
        else:
            return None
    return answers[0]


def config_value_problem(config: ConfigDict) -> str | None:
    """What is wrong with the values of a config of main.py; None if everything can be built from it."""
    config.model.update(nf=8, num_res_blocks=1)
    try:
        sde = get_sde(config)
        get_objective(config, create_score_model(config, sde))
        get_sampler(config, sde)
        get_likelihood(config, sde)
    except ValueError as error:
        return str(error)
    return None


def _has_flag(values: dict[str, Any], name: str) -> bool:
    head, *fields = name.split(".")
    value = values.get(head)
    for field in fields:
        value = value[field] if value is not None and field in value else None
    return value is not None if fields else head in values


def config_problem(reference: str) -> str | None:
    """What is wrong with ``FILE.py:ARGUMENT``; None if it gives a config."""
    name, _, argument = reference.partition(":")
    try:
        get_config = runpy.run_path(str(ROOT / name))["get_config"]
        get_config(argument)
    except (KeyError, ValueError) as error:
        return str(error)
    return None


def problems(text: str, folder: Path) -> list[str]:
    """Everything that a Markdown document in ``folder`` names and that does not exist."""
    found = []
    for command in commands(text):
        if problem := command_problem(command):
            found.append(f"{shlex.join(command)}: {problem}")
    if found:
        return found
    programs, build = _programs(text), "```python" not in text  # Python code may make more values acceptable
    for span in code_spans(text):
        if span.startswith("--") and (problem := flags_problem(span.split(), programs, build=build)):
            found.append(f"{span}: {problem}")
    found += [f"{link}: no such file or heading" for link in _broken_links(text, folder)]
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines():
        found += _missing_files(line, folder)
    return found


def _programs(text: str) -> list[list[str]]:
    """The programs that flags in a sentence may belong to: those that the document runs, else main.py."""
    found = []
    for command in commands(text):
        arguments = python_arguments(command)
        if arguments is not None and is_ours(arguments):
            found.append(complete(arguments))
    return found or [["main.py", *STAND_INS]]


def _broken_links(text: str, folder: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text() if path else text)):
            yield link


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _missing_files(line: str, folder: Path) -> Iterator[str]:
    """Python files, configs with their arguments, and in tables folders.

    After ``a/b.py:u``, ``:v`` is another argument of that file and ``c.py`` may be beside it.
    """
    config = ""
    for span in re.findall(r"`([^`]+)`", line):
        if ELLIPSIS in span or " " in span:
            continue
        if match := re.fullmatch(r"([\w./-]+\.py)(:\w+)?", span):
            name, argument = match.groups()
            places = [place for place in (ROOT, folder, (ROOT / config).parent) if (place / name).is_file()]
            if not places:
                yield f"{span}: no such file"
            else:
                config = str((places[0] / name).relative_to(ROOT))
        elif line.startswith("|") and re.fullmatch(r"[\w./-]+/", span) and not (ROOT / span).is_dir():
            yield f"{span}: no such folder"
        if config and re.fullmatch(r"(\S+\.py)?:\w+", span):
            argument = span.rpartition(":")[2]
            if problem := config_problem(f"{config}:{argument}"):
                yield f"{span}: {problem}"
