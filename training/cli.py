"""What all command lines share: the parser, checks of numbers, messages, and errors in one sentence."""

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import torch
from tqdm import tqdm

from mnist import DataError

GPU_IS_TAKEN = re.compile(r"CUDA error: out of memory|busy or unavailable"
                          r"|CU(BLAS|DNN)_STATUS_\w*(ALLOC\w*FAILED|NOT_INITIALIZED)")
NO_MEMORY = re.compile("allocate memory|you tried to allocate")  # of torch on Linux and on Windows


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
    """Return a type for argparse: numbers of type `convert` in [low, high]; NaN is rejected."""
    kind = {int: "an integer", float: "a number"}[convert]

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {low} to {high}")
        return value

    return parse


def print_line(text, stream=None):
    """Print a line; if that fails, as with a closed pipe or a full disk, continue without output."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text):
    with tqdm.external_write_mode(sys.stderr):  # not at the end of a progress bar's line
        print_line(f"WARNING: {text}", sys.stderr)


def shell_command(*words):
    """Return a command as a user types it in the system's shell, with quotes where they are needed."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run_program(program, main, parse, argv, memory_advice):
    """Run `main(parse(argv))` and return the exit status; report user errors in one sentence."""
    prepare_streams()
    threading.excepthook = hide_os_error
    try:
        main(parse(argv))
        return 0
    except KeyboardInterrupt as interruption:
        print_line(f"\n{str(interruption) or 'interrupted'}", sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        return report_error(program, error, memory_advice)


def prepare_streams():
    """Let no message end a program: discard those to a missing stream, and escape characters that it cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, or pythonw on Windows
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def hide_os_error(failure):
    """Replace threading.excepthook: TensorBoard's thread fails on a full disk, and its writer raises that again."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def report_error(program, error, memory_advice):
    """Print what is wrong and what to do in one sentence, and return the exit status; re-raise programming errors."""
    if isinstance(error, (UserError, DataError)):  # two classes, as mnist.py imports nothing of the project
        message = str(error)
    elif full := memory_problem(error):
        message = f"{full}; {memory_advice}{', or use --no-cuda' if 'GPU' in full else ''}"
    else:
        raise error
    print_line(f"{program}: error: {message}", sys.stderr)
    return getattr(error, "status", 1)


def memory_problem(error):
    """Return a clause for an error that means a full memory, or a busy GPU; None for others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and GPU_IS_TAKEN.search(text):
        return "the GPU does not have enough free memory, or another program has exclusive use of it"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(text):
        return "there is not enough memory"
    return None
