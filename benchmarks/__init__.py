"""Programs that measure this project and write the figures of README.md and docs/:  python -m benchmarks.NAME"""

import training.threads  # noqa: F401 (before torch, which reads the variables that it sets)
