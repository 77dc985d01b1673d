"""What a run needs to go on after it was stopped or killed, in one file: <run>/checkpoints/training_state.pt.

It is written whole or not at all, and the one before it stays as training_state.previous.pt. Beside it lies
model_checkpoint.pt, the averaged weights alone, for everybody else.
"""

import io
import os
import re
import shutil
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from utils import sync, write_atomically

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

FORMAT = "adversarial autoencoder, training state 2"
OLD_FORMAT = "adversarial autoencoder, training state 1"  # without the average of the weights
CURRENT, PREVIOUS, WEIGHTS = "training_state.pt", "training_state.previous.pt", "model_checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint or run that cannot be gone on with; the message says why and what to do."""


def save_state(run, state, weights, keep=True):
    """Write a dict of tensors, numbers, strings, lists and dicts as the run's training state, and beside it `weights`.

    The state before it becomes the previous one if `keep`, else it is replaced.
    """
    folder = Path(run) / "checkpoints"
    state = {"format": FORMAT, "events": settled_events(run), **state}
    write_atomically(folder / CURRENT, packed(state), keep=folder / PREVIOUS if keep else None)
    write_atomically(folder / WEIGHTS, packed(weights))


def run_folder(resume):
    """Return the run's folder for what --resume names: that folder, or one of the training states in it."""
    path = Path(resume)
    if path.is_dir():
        if not has_state(path):
            raise CheckpointError(f"{path} cannot be resumed, for it has no checkpoints/{CURRENT}; name another run's folder, or "
                                  f"begin a new run")
        return path
    folder = Path(os.path.abspath(path)).parent
    if path.is_file() and folder.name == "checkpoints" and path.name in (CURRENT, PREVIOUS):
        return folder.parent
    raise CheckpointError(f"{path} is no run's folder, and no {CURRENT} or {PREVIOUS} in its checkpoints/")


def has_state(run):
    """Return whether a run has got as far as to its first training state."""
    return any((Path(run) / "checkpoints" / name).exists() for name in (CURRENT, PREVIOUS))


def latest_run(log_dir):
    """Return the newest run's folder under `log_dir` that has a training state; raise CheckpointError without one."""
    states = [state for name in (CURRENT, PREVIOUS) for state in Path(log_dir).glob(f"*/checkpoints/{name}")]
    if not states:
        raise CheckpointError(f"no run in {log_dir} can be resumed; name its folder, or another place with --log_dir")
    return max(states, key=lambda state: state.parent.parent.name).parent.parent


def load_state(resume):
    """Return the training state for what --resume names, with its own path as `path`.

    Raises CheckpointError where it is damaged or something else.
    """
    if Path(resume).is_file():
        return read_state(resume)
    current, previous = (Path(resume) / "checkpoints" / name for name in (CURRENT, PREVIOUS))
    if not current.exists():  # killed between the two renames of write_atomically
        return read_state(previous)
    try:
        return read_state(current)
    except CheckpointError as error:
        with suppress(CheckpointError):
            read_state(previous)
            error = CheckpointError(f"{error}; the one before it is whole: --resume {previous}")
        raise error from None


def read_state(path):
    """Return the training state in a file; raise CheckpointError if it is damaged or no training state."""
    state = read_packed(path)
    if isinstance(state, dict) and state.get("format") == OLD_FORMAT:
        raise CheckpointError(f"{path} is of an older version of the program, which did not average the weights; evaluate.py "
                              f"takes the run, but to go on, begin a new one")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of this version of the program; {CURRENT} is one, "
                              f"{WEIGHTS} is not")
    return {**state, "path": str(path)}


def read_packed(path):
    """Return what torch.save wrote into a file, on the CPU; raise CheckpointError if it is missing or damaged."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is missing, or no file")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # what torch.save writes; torch.load checks no sums
            damaged = archive.testzip()
        if not damaged:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # the two readers raise a dozen kinds for what is no archive of theirs
        pass
    raise CheckpointError(f"{path} is damaged, or no checkpoint")


def clear_after(run, state):
    """Take a run back to where it was when a training state was saved: remove what was logged and begun since then."""
    current = Path(run) / "checkpoints" / CURRENT
    if os.path.abspath(state["path"]) != os.path.abspath(current):
        os.replace(state["path"], current)
    for file in Path(run).rglob("*.tmp"):
        file.unlink()
    for file in Path(run).glob("results/*/*_*.png"):
        if int(re.search(r"\d*$", file.stem)[0] or 0) > state["epoch"]:
            file.unlink()
    for projector in (*Path(run).glob("*/codes"), Path(run) / "projector_config.pbtxt"):  # written when a run is finished
        shutil.rmtree(projector.parent) if projector.is_dir() else projector.unlink(missing_ok=True)
    for file in Path(run).glob("events.out.tfevents.*"):
        if file.name not in state["events"]:
            file.unlink()
        elif file.stat().st_size > state["events"][file.name]:
            os.truncate(file, state["events"][file.name])


def settled_events(run):
    """Wait until the run's event files are on the disk, as far as they are written; return the size of each in bytes."""
    files = list(Path(run).glob("events.out.tfevents.*"))
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}


@contextmanager
def locked(run):
    """Hold a run for this process alone; raise CheckpointError where another one has it. The lock ends with the process."""
    if fcntl is None:
        yield
        return
    with open(Path(run) / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{run} is in use by another process; wait until it ends, or stop it") from None
        except OSError as error:  # a file system without locks
            print(f"WARNING: {run} cannot be locked ({error.strerror}): see to it that no other process resumes it",
                  file=sys.stderr)
        yield


def weights_on_cpu(model):
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def packed(value):
    """Return what torch.save writes of a value, as bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
