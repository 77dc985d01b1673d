"""A run's folder: creating, finding and locking it, and the command that resumes the run."""

import os
import shlex
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from training.checkpoint import CURRENT, PREVIOUS, CheckpointError, read_state
from training.cli import UserError, warn

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def create_run_folder(log_dir):
    """Create <log_dir>/<YYYY_mm_dd_HH_MM_SS>/ and return its path. If it exists, wait for the next second."""
    while True:
        run = Path(log_dir) / datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
        try:
            run.parent.mkdir(parents=True, exist_ok=True)
            run.mkdir()
            return run
        except FileExistsError:
            if not run.is_dir():
                raise UserError(f"{log_dir} is not a folder; choose another one with --log_dir") from None
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"no folder can be created in {log_dir}: {error.strerror}; choose another one with "
                            f"--log_dir, or free disk space or check the permissions there") from None


def run_folder(resume):
    """Return the run's folder, given that folder or one of its training states."""
    path = Path(resume)
    if path.is_dir():
        if not has_state(path):
            raise CheckpointError(f"{path} cannot be resumed, because it has no checkpoints/{CURRENT}; name another "
                                  f"run's folder, or start a new run")
        return path
    folder = Path(os.path.abspath(path)).parent
    if path.is_file() and folder.name == "checkpoints" and path.name in (CURRENT, PREVIOUS):
        return folder.parent
    raise CheckpointError(f"{path} is not a run; name a run's folder, or the {CURRENT} or {PREVIOUS} in its "
                          f"checkpoints/")


def has_state(run):
    """Return whether a run has saved a training state."""
    return any((Path(run) / "checkpoints" / name).exists() for name in (CURRENT, PREVIOUS))


def latest_run(log_dir):
    """Return the folder of the run in `log_dir` that was saved last; raise CheckpointError if there is none."""
    states = [state for name in (CURRENT, PREVIOUS) for state in Path(log_dir).glob(f"*/checkpoints/{name}")]
    if not states:
        raise CheckpointError(f"{log_dir} has no run to resume; name the run's folder, or set --log_dir")
    return max(states, key=time_of_saving).parent.parent


def time_of_saving(path):
    """Return when a training state was saved, in seconds since 1970: as recorded in it, or its modification time."""
    try:
        return read_state(path)["saved"]
    except (CheckpointError, KeyError):  # damaged, or from an older version of the program
        return path.stat().st_mtime


def resume_hint(run):
    """Return a clause on how to resume a run."""
    if not has_state(run):
        return "it had no checkpoint yet, so start a new run"
    return f"resume it with: python {shlex.quote(os.path.relpath(TRAIN))} --resume {shlex.quote(str(run))}"


@contextmanager
def locked(run):
    """Lock a run; raise CheckpointError if another process has locked it. The lock ends with the process."""
    if fcntl is None:
        yield
        return
    with open(Path(run) / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{run} is in use by another process; wait until it ends, or stop it") from None
        except OSError as error:  # a file system without locks
            warn(f"{run} cannot be locked ({error.strerror}); make sure that no other process resumes it")
        yield
