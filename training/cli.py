"""What all command lines share: the parser, checks of numbers, messages, and errors in one sentence."""

import argparse
import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading

from tqdm import tqdm

from mnist import DataError
from training import presses

NO_MEMORY = re.compile(r"out of memory|tried to allocate|ALLOC\w*FAILED|busy or unavailable")  # of CUDA, of the CPU


class UserError(RuntimeError):
    """An error that the user can fix; the message says what is wrong and what to do."""


class FlagError(UserError):
    """A flag that this machine does not support, or that contradicts the run to be resumed."""

    status = 2  # the exit status; 1 for other errors


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that takes a value, and the examples line by line."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """Reports an invalid flag in one sentence, without the usage."""

    def __init__(self, prog, description, **options):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter,
                         **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(convert, low, high=2**31 - 1):
    """Return add_argument's options for a flag: a number of type `convert` in [low, high]; NaN is rejected."""
    kind, metavar = {int: ("an integer", "N"), float: ("a number", "X")}[convert]

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {low} to {high}")
        return value

    return {"type": parse, "metavar": metavar}


def print_line(text, stream=None):
    """Print a line, above the progress bar if there is one."""
    with tqdm.external_write_mode(stream):
        print(text, file=stream, flush=True)


def has_width(stream):
    """Whether a stream is a terminal that says how wide it is, so that a progress bar fits; some say 0 columns."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is no file, or closed
        return os.get_terminal_size(stream.fileno()).columns > 0
    return False


def warn(text):
    print_line(f"WARNING: {text}", sys.stderr)


def shell_command(*words):
    """Return a command as a user types it in the system's shell, with quotes where they are needed."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run_program(program, main, parse, argv):
    """Run `main(parse(argv))` and return the exit status; report errors that the user can fix in one sentence."""
    prepare_streams()
    sys.excepthook = sys.__excepthook__  # from here on, errors are reported here
    try:
        if presses:  # while modules were imported
            raise KeyboardInterrupt
        main(parse(argv))
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if (words := explain(error)) is None:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        words = "; ".join([words, *getattr(error, "__notes__", ())])  # a run notes how to resume it
        print_line(f"\n{words}" if interrupted else f"{program}: error: {words}", sys.stderr)
        return 128 + signal.SIGINT if interrupted else getattr(error, "status", 1)


def prepare_streams():
    """Discard messages to a missing stream, escape characters that a stream cannot encode, and hide a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, or pythonw on Windows
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # On a full disk, TensorBoard's thread ends with an error that its writer raises again.
    threading.excepthook = lambda hook: issubclass(hook.exc_type, OSError) or threading.__excepthook__(hook)


def explain(error):
    """Return what is wrong and what to do about an error that the user can fix; None for others."""
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, (KeyboardInterrupt, UserError, DataError)):  # mnist.py imports nothing of the project
        return text
    if isinstance(error, OSError):
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror or text}; free space, check permissions, or choose another folder"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(text):
        first, _, _ = (text or repr(error)).partition("\n")
        return f"the device is in use, or lacks memory: {first}; end other programs, or try a smaller batch or model"
    return None
