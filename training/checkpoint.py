"""A run's folder, and its training state: everything that a resume needs, in <run>/checkpoints/training_state.pt.

The state is written atomically, and the previous one is kept as training_state.previous.pt. model_checkpoint.pt, in the
same folder, has only the averaged weights, for other uses.
"""

import io
import os
import re
import time
import zipfile
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from training.cli import UserError, shell_command, warn
from training.files import replace, write_atomically, writing

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

FORMAT = "adversarial autoencoder, training state 3"
CURRENT, PREVIOUS, WEIGHTS = "training_state.pt", "training_state.previous.pt", "model_checkpoint.pt"
EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+")  # of SummaryWriter: time, host, process, number
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or a run that cannot be resumed."""


def save_state(run, state, keep=True):
    """Save the training state, of tensors, numbers and strings in lists and dicts, and its averaged weights alone.

    If `keep`, the current state becomes the previous one, as a copy: at any time, the current one exists.
    """
    folder = Path(run) / "checkpoints"
    state = {"format": FORMAT, "events": sync_event_files(run), **state}
    if keep and (folder / CURRENT).exists():
        write_atomically(folder / PREVIOUS, (folder / CURRENT).read_bytes())
    write_atomically(folder / CURRENT, serialize(state))
    write_atomically(folder / WEIGHTS, serialize(state["ema"]["weights"]))


def load_state(resume):
    """Return the training state at `resume`, a run's folder or a file, with the file's path under "path"."""
    if os.path.isfile(resume):
        return read_state(resume)
    current, previous = (Path(resume) / "checkpoints" / name for name in (CURRENT, PREVIOUS))
    try:
        return read_state(current)
    except CheckpointError as error:
        with suppress(CheckpointError):
            read_state(previous)
            error = CheckpointError(f"{error}; resume the previous one, which is intact: --resume {previous}")
        raise error from None


def read_state(path):
    """Return the training state in a file; raise CheckpointError if it is damaged or not a training state."""
    state = load_checked(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training state of this version of the program; name a {CURRENT} of "
                              f"this version, or start a new run")
    return {**state, "path": str(path)}


def load_checked(path):
    """Return what torch.save wrote into a file, on the CPU; raise CheckpointError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # the format of torch.save; torch.load ignores checksums
            if not archive.testzip():
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; name another file") from None
    except Exception:  # both readers raise many kinds of errors for invalid files
        pass
    raise CheckpointError(f"{path} is damaged, or not a checkpoint; name another file")


def serialize(value):
    """Return what torch.save writes for a value, as bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def rewind(run, state):
    """Rewind a run to the moment when a training state was saved: remove the events that it has logged since then.

    A resumed run writes everything else again. Other files in the folder are not touched.
    """
    replace(state["path"], Path(run) / "checkpoints" / CURRENT)  # no change, unless it is the previous state
    for file in event_files(run):
        if file.name not in state["events"]:
            file.unlink()
        elif file.stat().st_size > state["events"][file.name]:
            os.truncate(file, state["events"][file.name])


def event_files(run):
    return [file for file in Path(run).glob("events.out.tfevents.*") if EVENT_FILE.fullmatch(file.name)]


def sync_event_files(run):
    """Force the run's event files to disk and return their sizes in bytes."""
    files = event_files(run)
    for path in files:
        with open(path, "ab") as file:
            os.fsync(file.fileno())
    return {path.name: path.stat().st_size for path in files}


# A run's folder ------------------------------------------------------------------------------------------------------

def create_run_folder(log_dir):
    """Create <log_dir>/<YYYY_mm_dd_HH_MM_SS>/ and return its path. If it exists, wait for the next second."""
    while True:
        run = Path(log_dir) / datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"no folder can be created in {log_dir}: {error.strerror}; choose another one with "
                            f"--log_dir, or free disk space or check the permissions there") from None


def run_folder(resume):
    """Return the run's folder, given that folder or one of its training states."""
    path = Path(resume)
    folder = Path(os.path.abspath(path)).parent
    if os.path.isfile(path) and folder.name == "checkpoints" and path.name in (CURRENT, PREVIOUS):
        return folder.parent
    if not os.path.exists(path / "checkpoints" / CURRENT):
        raise CheckpointError(f"{path} cannot be resumed: it is no training state, and has no checkpoints/{CURRENT}; "
                              f"name a run's folder or a training state in one, or start a new run")
    return path


def latest_run(log_dir):
    """Return the folder of the run in `log_dir` that was saved last; raise CheckpointError if there is none."""
    states = list(Path(log_dir).glob(f"*/checkpoints/{CURRENT}"))
    if not states:
        raise CheckpointError(f"{log_dir} has no run to resume; name the run's folder, or set --log_dir")
    return max(states, key=lambda state: state.stat().st_mtime).parent.parent


def resume_hint(run):
    """Return a clause on how to resume a run."""
    if not os.path.exists(run / "checkpoints" / CURRENT):
        return "it had no checkpoint yet, so start a new run"
    train = TRAIN
    with suppress(ValueError):  # on Windows, if it is on another drive
        train = os.path.relpath(TRAIN)
    return f"resume it with: {shell_command('python', str(train), '--resume', str(run))}"


@contextmanager
def locked(run):
    """Lock a run and report errors of writing to it; raise CheckpointError if another process has locked it."""
    with writing(run), open(Path(run) / ".lock", "wb") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError:
            raise CheckpointError(f"{run} is in use by another process; wait until it ends, or stop it") from None
        except OSError as error:  # a file system without locks
            warn(f"{run} cannot be locked ({error.strerror}); make sure that no other process resumes it")
        yield
