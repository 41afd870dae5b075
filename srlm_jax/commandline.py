"""What all commands have in common: flags, and how they end on an error."""

import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

from absl import app, flags, logging

from srlm_jax.parallel import hosts

_DEBUG = flags.DEFINE_bool("debug", False, "Print a traceback with every error.")

# How the reason of a refused value begins, and what is said in its place.
_REASONS = {
    "invalid literal for int()": "must be a whole number",
    "could not convert string to float": "must be a number",
    "('Non-boolean argument": "must be true or false",
    "Failed to parse": "is a group of fields; set one of them",
}


def run(main: Callable[[list[str]], None], required: Sequence[str], fields: Sequence[str] = ()) -> None:
    """Parses the flags and calls `main` with the arguments that are left.

    A flag that is unknown or refused, and a configuration that cannot be read, end the process with status 1 and one
    line on stderr; `--debug` adds the traceback.

    Args:
      required: names of the flags that must be given.
      fields: full names of the fields of `--config`, for the flag that was probably meant.
    """
    flags.mark_flags_as_required(required)
    app.run(main, flags_parser=functools.partial(parse_flags, fields=fields))


def begin(argv: list[str], example: str) -> AbstractContextManager[None]:
    """Refuses arguments that are no flags, and silences the libraries' logs.

    The command runs inside what is returned, which ends the process if an error is raised: see `hosts.leaving`.
    """
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; options have the form {example}")
    logging.set_verbosity(logging.ERROR)
    return hosts.leaving(_DEBUG.value)


def parse_flags(argv: list[str], fields: Sequence[str]) -> list[str]:
    """The arguments that are no flags, as absl returns them; see `run`."""
    config = _config_file(argv)
    if config is not None and (reason := _no_file(config)):
        _refuse(argv, f"--config={config}: {reason}")
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a configuration is a program, which may raise anything
        _refuse(argv, _reason(error, argv, config, fields))


def _refuse(argv: list[str], reason: str) -> NoReturn:
    """Ends the process. The flags are not parsed yet, so `--debug` is looked for in `argv`."""
    if sys.exception() is not None and {"--debug", "-debug", "--debug=true", "--debug=1"} & set(argv):
        traceback.print_exc()
    sys.exit(f"error: {reason}")


def _config_file(argv: list[str]) -> str | None:
    """The value of `--config` among the arguments, the last one as for absl; None where there is none."""
    found = None
    for index, argument in enumerate(argv):
        if match := re.fullmatch("--?config(?:=(.*))?", argument):
            found = argv[index + 1] if match[1] is None and index + 1 < len(argv) else match[1]
    return found


def _no_file(config: str) -> str | None:
    """Why the value of `--config` names no file, None where it does."""
    path = config.partition(":")[0]
    if os.path.isfile(path):
        return None
    if os.path.isdir(path):
        return "is a folder; name one of its files"
    folder = os.path.dirname(path)
    files = [name for name in os.listdir(folder or ".") if name.endswith(".py")] if os.path.isdir(folder or ".") else []
    return "no such file" + _meant("", os.path.basename(path), files, lambda name: os.path.join(folder, name))


def _meant(dashes: str, name: str, known: Sequence[str], whole: Callable[[str], str] = str) -> str:
    """A question for the name that was probably meant, "" where none is like it."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {dashes}{whole(near[0])}?" if near else ""


def _reason(error: Exception, argv: list[str], config: str | None, fields: Sequence[str]) -> str:
    """One line on why the flags cannot be parsed."""
    root = error
    while root.__context__ is not None:
        root = root.__context__
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname in fields and config is None:
            return f"--{error.flagname} is given, and --config is not: name the configuration with --config=FILE"
        return f"--{error.flagname}: no such flag" + _meant("--", error.flagname, [*flags.FLAGS, *fields])
    if match := re.match("flag --([^=]+)=None: Flag --.* must have a value other than None", str(error)):
        return f"--{match[1]} is not given"
    if isinstance(error, AttributeError | KeyError):  # how config_flags tells of a field that does not exist
        names = [argument.lstrip("-").partition("=")[0] for argument in argv]
        unknown = next((name for name in names if name.startswith("config.") and name not in fields), None)
        if unknown is not None:
            return f"--{unknown}: no such field; did you mean --{_nearest(unknown, fields)}?"
    if "Error whilst parsing config file" in str(error) or not isinstance(error, flags.Error):
        kind = "" if type(root) is ValueError else f"{type(root).__name__}: "
        return f"--config={config}: {kind}{_first_line(root)}"
    name, _, reason = _first_line(error).removeprefix("flag ").partition(": ")
    said = next((said for begins, said in _REASONS.items() if reason.startswith(begins)), reason)
    return f"{name}: {said}" if reason else name


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _nearest(name: str, known: Sequence[str]) -> str:
    """The name most alike, its last part counted twice: `config.learning_rte` has no likeness but there."""

    def likeness(other: str) -> float:
        pairs = ((name, other), (name.rpartition(".")[2], other.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=likeness)
