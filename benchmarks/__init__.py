"""Programs that measure this project and write the figures of README.md and docs/:  python -m benchmarks.NAME"""

import training  # noqa: F401 (before torch, which reads the variables that it sets)
