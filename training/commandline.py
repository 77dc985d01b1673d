"""What all command lines share: the parser, checked numbers, messages, and the frame that ends in one sentence."""

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import threading

import torch

from mnist import DataError

GPU_IS_TAKEN = re.compile(r"CUDA error: out of memory|busy or unavailable"
                          r"|CU(BLAS|DNN)_STATUS_\w*(ALLOC\w*FAILED|NOT_INITIALIZED)")


class UserError(RuntimeError):
    """Something that the user can mend; the message says what is wrong and what to do. `status` is the exit status."""

    status = 1


class FlagError(UserError):
    """A flag that fits neither the machine nor the run to be resumed."""

    status = 2


class RunStopped(Exception):
    """A run that a signal stopped, with everything saved; the message says how to resume it."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


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
    """Return a type for argparse: numbers of type `convert` within [low, high], not NaN."""
    kind = {int: "a whole number", float: "a number"}[convert]

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
    """Print a line; where nobody can read it any more, or its disk is full, the program continues without."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text):
    print_line(f"WARNING: {text}", sys.stderr)


def duration(seconds):
    """Return seconds as text, such as 1 h 02 min 03 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {seconds:02} s" if hours else f"{minutes} min {seconds:02} s"


def run_program(program, main, parse, argv, memory_advice, disk_advice="make room or rights there"):
    """Run `main(parse(argv))` and return the exit status; what the user can mend is said in one sentence."""
    with silent_writer_threads():
        try:
            main(parse(argv))
            return 0
        except RunStopped as stopped:
            print_line(f"\n{stopped}", sys.stderr)
            return 128 + stopped.signum
        except KeyboardInterrupt as interruption:
            print_line(f"\n{str(interruption) or 'interrupted'}", sys.stderr)
            return 128 + signal.SIGINT
        except Exception as error:
            return report_error(program, error, memory_advice, disk_advice)


@contextlib.contextmanager
def silent_writer_threads():
    """Keep quiet about OSError, such as a full disk, in TensorBoard's thread: its writer raises it in ours, too."""
    before = threading.excepthook

    def hook(failure):
        if not issubclass(failure.exc_type, OSError):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def report_error(program, error, memory_advice, disk_advice):
    """Say in one sentence what is wrong and what to do, and return the exit status; raise a programming error again."""
    status = getattr(error, "status", 1)
    if isinstance(error, (UserError, DataError)):  # mnist.py imports nothing of the project, so it has its own class
        message = str(error)
    elif isinstance(error, OSError):
        message = f"{error.filename or 'a file'} cannot be written: {error.strerror}; {disk_advice}"
    elif gpu_is_taken(error):
        message = gpu_memory_message(memory_advice)
    elif isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate memory" in str(error):
        message = f"there is not enough memory; {memory_advice}"
    else:
        raise error
    print_line(f"{program}: error: {message}", sys.stderr)
    return status


def gpu_is_taken(error):
    """Return whether an error means that the GPU is full or busy; torch has a class of its own for one case alone."""
    return (isinstance(error, torch.OutOfMemoryError)
            or isinstance(error, RuntimeError) and GPU_IS_TAKEN.search(str(error)))


def gpu_memory_message(memory_advice):
    """Return what to do about a GPU that is full or busy; `memory_advice` only where this process has filled it."""
    reserved, total = 0, 1
    with contextlib.suppress(RuntimeError, AssertionError):  # a GPU that cannot be asked
        reserved, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    if reserved > total / 2:
        return f"the GPU has not enough memory; {memory_advice}, or --no-cuda"
    return ("the GPU's memory is full, or another program has it for itself; end the other programs there, "
            "or use --no-cuda")
