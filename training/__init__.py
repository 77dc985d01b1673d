"""What training needs beyond the recipe in train.py. Two things are set before anything large is imported."""

import contextlib
import signal
import sys
from types import ModuleType

presses = []  # of Ctrl-C


def interrupt(signum, _):
    """Handle Ctrl-C, and note it: C code of torch and numpy may drop the error while it imports modules."""
    presses.append(signum)
    raise KeyboardInterrupt


def report_exception(*error):
    """Replace sys.excepthook: Ctrl-C while a program still imports torch needs no traceback."""
    if presses or error[0] is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(*error)


if hasattr(sys.modules["__main__"], "__file__") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    sys.excepthook = report_exception  # not in a notebook or at a prompt
    with contextlib.suppress(ValueError):  # a thread may not set it
        signal.signal(signal.SIGINT, interrupt)

# TensorBoard's switch for doing without TensorFlow: it is slow to import, and an empty folder of its name is an error.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
