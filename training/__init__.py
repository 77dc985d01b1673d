"""What training needs beyond the recipe in train.py. Two things are set before anything large is imported."""

import sys
from types import ModuleType


def report_exception(kind, *others):
    """Replace sys.excepthook: Ctrl-C while a program still imports torch needs no traceback."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *others)


if hasattr(sys.modules["__main__"], "__file__"):  # not in a notebook or at a prompt
    sys.excepthook = report_exception

# TensorBoard's switch for doing without TensorFlow: it is slow to import, and an empty folder of its name is an error.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
