"""What training needs beyond the recipe in train.py."""

import sys
from types import ModuleType

# TensorBoard's switch for doing without TensorFlow: it is slow to import, and an empty folder of its name is an error.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
