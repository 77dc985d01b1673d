"""The folder of a run: where it is, who uses it, and the command that resumes it."""

import os
import shlex
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from runs.checkpoint import CURRENT, PREVIOUS, CheckpointError, read_state
from training.commandline import UserError, warn

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def create_run_folder(log_dir):
    """Make <log_dir>/<YYYY_mm_dd_HH_MM_SS>/ and return its path. Of runs in the same second, one waits for the next."""
    while True:
        run = Path(log_dir) / datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
        try:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.mkdir()
            return run
        except FileExistsError:
            if not run.is_dir():
                raise UserError(f"{log_dir} is no folder; choose another one with --log_dir") from None
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"no folder can be made in {log_dir}: {error.strerror}; choose another one with --log_dir, "
                            f"or make room or rights there") from None


def run_folder(resume):
    """Return the run's folder for what --resume names: that folder, or one of the training states in it."""
    path = Path(resume)
    if path.is_dir():
        if not has_state(path):
            raise CheckpointError(f"{path} cannot be resumed, for it has no checkpoints/{CURRENT}; name another run's "
                                  f"folder, or begin a new run")
        return path
    folder = Path(os.path.abspath(path)).parent
    if path.is_file() and folder.name == "checkpoints" and path.name in (CURRENT, PREVIOUS):
        return folder.parent
    raise CheckpointError(f"{path} is no run's folder, and no {CURRENT} or {PREVIOUS} in its checkpoints/")


def has_state(run):
    """Return whether a run has got as far as to its first training state."""
    return any((Path(run) / "checkpoints" / name).exists() for name in (CURRENT, PREVIOUS))


def latest_run(log_dir):
    """Return the folder of the run under `log_dir` that was saved last; raise CheckpointError without one."""
    states = [state for name in (CURRENT, PREVIOUS) for state in Path(log_dir).glob(f"*/checkpoints/{name}")]
    if not states:
        raise CheckpointError(f"no run in {log_dir} can be resumed; name its folder, or another place with --log_dir")
    return max(states, key=time_of_saving).parent.parent


def time_of_saving(path):
    """Return when a training state was saved, in seconds since 1970: as it says, or else as the file system does."""
    try:
        return read_state(path)["saved"]
    except (CheckpointError, KeyError):  # it is damaged, or of an older version of the program
        return path.stat().st_mtime


def resume_hint(run):
    """Return what to do to resume a run."""
    if not has_state(run):
        return "it had no checkpoint yet, so begin a new run"
    return f"resume it with: python {shlex.quote(os.path.relpath(TRAIN))} --resume {shlex.quote(str(run))}"


@contextmanager
def locked(run):
    """Hold a run for this process alone; raise CheckpointError where another has it. The lock ends with the process."""
    if fcntl is None:
        yield
        return
    with open(Path(run) / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{run} is in use by another process; wait until it ends, or stop it") from None
        except OSError as error:  # a file system without locks
            warn(f"{run} cannot be locked ({error.strerror}): see to it that no other process resumes it")
        yield
