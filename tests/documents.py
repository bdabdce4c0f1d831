"""What a document promises: that its commands start, and that the flags, configs, files and links it names exist.

A command is a line of a fenced block, or a code span, that starts with one of ``PROGRAMS``. The program itself checks
it: it reads its command line in this process and stops there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from absl import app, flags

from configs.checks import check

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "accelerate", "make", "srun")
ELLIPSIS = "…"  # stands for the flags that a sentence leaves out
STAND_INS = ("--config=configs/digits.py", "--workdir=runs/x", "--mode=train")


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks of code in one of the languages, '' for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    return [block for language, block in found if language in languages]


def code_spans(text: str) -> Iterator[str]:
    """Inline code; a span that a line break divides is one line again."""
    for span in re.findall(r"`([^`]+)`", _prose(text)):
        yield " ".join(span.split())


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def shell_commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a piece of shell that start a program. A loop is read with the first of its values; a
    variable that is neither the loop's nor the environment's, and what a command would print, becomes 1."""
    values = dict(os.environ)
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "1", line), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        first = next((word for word in line.split() if not re.match(r"\w+=", word)), "")
        if first not in (*PROGRAMS, "for"):  # output, sentences, programs that are not ours
            continue
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
    """All commands of a Markdown document: those in blocks of shell or of no language, then those in sentences."""
    pieces = [*blocks(text, "", "sh", "bash"), *code_spans(text)]
    return [command for piece in pieces for command in shell_commands(piece)]


def run_program(arguments: Sequence[str], *, only_parse: bool) -> dict[str, object]:
    """Run ``python ARGUMENTS`` in this process, or only read its command line; return its flags and their values."""
    known, values = set(flags.FLAGS), {}

    def run(main: Callable, argv: None = None, flags_parser: Callable = flags.FLAGS) -> None:
        rest = flags_parser(sys.argv)
        values.update({name: flags.FLAGS[name].value for name in set(flags.FLAGS) - known})
        if not only_parse:
            main(rest)

    module = arguments[0] == "-m"
    argv = [*arguments[1:]] if module else [*arguments]
    try:
        with mock.patch.object(app, "run", run), mock.patch.object(sys, "argv", argv), warnings.catch_warnings():
            # A module that another test has imported already is run all the same.
            warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
            if module:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return values


def python_arguments(command: Sequence[str]) -> list[str] | None:
    """What a command makes Python run (``[FILE or -m, …]``), whatever launches it; None for make."""
    program, *arguments = command
    if program == "srun":
        return python_arguments(command[next(i for i, word in enumerate(command) if i and word in PROGRAMS) :])
    if program in ("python", ".venv/bin/python", "make"):
        return None if program == "make" else arguments
    if program == "torchrun":
        from torch.distributed.run import get_args_parser as parser
    else:
        from accelerate.commands.launch import launch_command_parser as parser

        arguments = arguments[1:]  # after launch
    parsed = parser().parse_args(arguments)
    return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]


def is_ours(arguments: Sequence[str]) -> bool:
    """Whether a program is of this repository, and not pip, pytest or the like."""
    return arguments[0] != "-m" or (ROOT / arguments[1].split(".")[0]).is_dir()


def complete(arguments: Sequence[str]) -> list[str]:
    """A command without its ellipsis; main.py then gets the flags that it cannot do without, and a config where it
    would take that of its workdir."""
    words = [word for word in arguments if word != ELLIPSIS]
    if words[0] != "main.py":
        return words
    missing = [flag for flag in STAND_INS if not any(w.startswith(flag.split("=")[0] + "=") for w in words)]
    if len(words) == len(arguments):
        missing = [flag for flag in missing if flag.startswith("--config=") and any("--workdir=" in w for w in words)]
    return [words[0], *missing, *words[1:]]


def command_problem(command: Sequence[str]) -> str | None:
    """What is wrong with a command; None if it would start."""
    if command[0] == "make":
        text = (ROOT / "Makefile").read_text()
        targets = " ".join(re.findall(r"^([a-z][\w -]*):(?!=)", text, flags=re.M)).split()
        known = targets + re.findall(r"\$\((?:if \$\()?([A-Z]+)", text)
        words = re.sub(r"-j \d+|--[\w-]+", "", " ".join(command[1:])).split()
        unknown = [word for word in words if word.partition("=")[0] not in known]
        return f"no such target: {', '.join(unknown)}" if unknown else None
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = python_arguments(command)
            if arguments[0] != "-m" and not (ROOT / arguments[0]).is_file():
                return f"no such file: {arguments[0]}"
            return _value_problem(complete(arguments)) if is_ours(arguments) else None
    except SystemExit as end:
        return end.code if isinstance(end.code, str) else errors.getvalue().strip().splitlines()[-1]
    except ImportError as error:
        return str(error)


def _value_problem(arguments: Sequence[str], bare: Sequence[str] = ()) -> str | None:
    """What is wrong with a program's flags, the config of main.py included, or with others that it must have."""
    values = run_program(arguments, only_parse=True)
    if unknown := [word for word in bare if not _has_flag(values, word.lstrip("-").split("=")[0])]:
        return f"no such flag: {', '.join(unknown)}"
    try:
        if arguments[0] == "main.py":
            check(values["config"])
    except ValueError as error:
        return str(error)
    return None


def flags_problem(words: Sequence[str], programs: Sequence[Sequence[str]]) -> str | None:
    """What is wrong with flags that a sentence mentions; None if one of the programs takes them.

    A flag without a value, or with a capital letter that stands for one, must exist; the others must be acceptable.
    """
    bare = [word for word in words if re.fullmatch(r"--[\w.]+(=[A-Z]+)?", word)]
    answers = []
    for program in programs:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                answers.append(_value_problem([*program, *(word for word in words if word not in bare)], bare))
        except SystemExit as end:
            answers.append(str(end.code))
        if answers[-1] is None:
            return None
    return answers[0]


def _has_flag(values: dict[str, object], name: str) -> bool:
    head, *fields = name.split(".")
    value = values.get(head)
    for field in fields:
        value = value[field] if value is not None and field in value else None
    return value is not None if fields else head in values


def problems(text: str, folder: Path) -> list[str]:
    """Everything that a Markdown document in ``folder`` names and that does not exist."""
    found = commands(text)
    wrong = [f"{shlex.join(command)}: {problem}" for command in found if (problem := command_problem(command))]
    if wrong:
        return wrong
    # The programs that flags in a sentence may belong to: those that the document runs, or else main.py.
    runs = [arguments for command in found if (arguments := python_arguments(command)) and is_ours(arguments)]
    programs = [*map(complete, runs), ["main.py", *STAND_INS]]
    for span in code_spans(text):
        if span.startswith("--") and (problem := flags_problem(span.split(), programs)):
            wrong.append(f"{span}: {problem}")
    wrong += [f"{link}: no such file or heading" for link in _broken_links(text, folder)]
    return wrong + [problem for line in _prose(text).splitlines() for problem in _missing_files(line, folder)]


def _broken_links(text: str, folder: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = folder / path
        if re.match(r"[a-z]+:", link) or (target.exists() and not anchor):
            continue
        if not target.exists() or anchor not in _anchors(target.read_text() if path else text):
            yield link


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _missing_files(line: str, folder: Path) -> Iterator[str]:
    """Python files, configs with their arguments, and in tables folders.

    After ``a/b.py:u``, ``:v`` is another argument of that file, and ``c.py`` may be in its folder.
    """
    config = ""
    for span in re.findall(r"`([^`\s]+)`", line):
        if match := re.fullmatch(r"([\w./-]+\.py)(:\w+)?", span):
            places = [place for place in (ROOT, folder, (ROOT / config).parent) if (place / match[1]).is_file()]
            if not places:
                yield f"{span}: no such file"
                continue
            config = str((places[0] / match[1]).relative_to(ROOT))
        elif line.startswith("|") and re.fullmatch(r"[\w./-]+/", span) and not (ROOT / span).is_dir():
            yield f"{span}: no such folder"
        if config and re.fullmatch(r"(\S+\.py)?:\w+", span) and (problem := _config_problem(config, span)):
            yield f"{span}: {problem}"


def _config_problem(file: str, span: str) -> str | None:
    try:
        runpy.run_path(str(ROOT / file))["get_config"](span.rpartition(":")[2])
    except (KeyError, ValueError) as error:
        return str(error)
    return None
