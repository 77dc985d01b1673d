"""The training state, everything that a resume needs, in one file: <run>/checkpoints/training_state.pt.

It is written atomically, and the previous one is kept as training_state.previous.pt. model_checkpoint.pt, in the same
folder, has only the averaged weights, for other uses.
"""

import io
import os
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from training.cli import UserError
from training.files import sync, write_atomically

FORMAT = "adversarial autoencoder, training state 2"
OLD_FORMAT = "adversarial autoencoder, training state 1"  # without averaged weights
CURRENT, PREVIOUS, WEIGHTS = "training_state.pt", "training_state.previous.pt", "model_checkpoint.pt"
PICTURES = {"results/Prior_samples": "samples_epoch_{}.png", "results/Reconstruction": "reconstruction_{}.png"}
PROJECTOR_FILES = ("tensors.tsv", "metadata.tsv", "sprite.png")  # SummaryWriter.add_embedding's, in <step>/codes/
EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d+\..+\.\d+\.\d+")  # of SummaryWriter: time, host, process, number


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or a run that cannot be resumed."""


def save_state(run, state, weights, keep=True):
    """Save the training state, a dict of tensors, numbers, strings, lists and dicts, and the averaged `weights`.

    If `keep`, the current state becomes the previous one; otherwise it is overwritten.
    """
    folder = Path(run) / "checkpoints"
    state = {"format": FORMAT, "events": sync_event_files(run), "saved": time.time(), **state}
    write_atomically(folder / CURRENT, serialize(state), keep=folder / PREVIOUS if keep else None)
    write_atomically(folder / WEIGHTS, serialize(weights))


def load_state(resume):
    """Return the training state at `resume`, a run's folder or a file, with the file's path under "path".

    Raises CheckpointError if it is damaged or not a training state.
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
            error = CheckpointError(f"{error}; resume the previous one, which is intact: --resume {previous}")
        raise error from None


def read_state(path):
    """Return the training state in a file; raise CheckpointError if it is damaged or not a training state."""
    state = load_checked(path)
    if isinstance(state, dict) and state.get("format") == OLD_FORMAT:
        raise CheckpointError(f"{path} is from an older version of the program, without averaged weights, and cannot "
                              f"be resumed; start a new run (python -m evaluation still accepts this one)")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training state of this version of the program; name a {CURRENT}, not "
                              f"a {WEIGHTS}")
    return {**state, "path": str(path)}


def load_checked(path):
    """Return what torch.save wrote into a file, on the CPU; raise CheckpointError if it is missing or damaged."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is missing, or not a file")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # the format of torch.save; torch.load ignores checksums
            damaged = archive.testzip()
        if not damaged:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # both readers raise many kinds of errors for invalid files
        damaged = True
    raise CheckpointError(f"{path} is damaged, or not a checkpoint")


def serialize(value):
    """Return what torch.save writes for a value, as bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


# Files that the program has written to a run's folder, identified by their full names ---------------------------------

def rewind(run, state):
    """Rewind a run to the moment when a training state was saved: remove everything it has written since then.

    Other files in the folder are not touched.
    """
    run = Path(run)
    current = run / "checkpoints" / CURRENT
    if os.path.abspath(state["path"]) != os.path.abspath(current):
        os.replace(state["path"], current)
    remove_files([*temporary_files(run), *pictures_after(run, state["epoch"])])
    remove_projector(run)
    for file in event_files(run):
        if file.name not in state["events"]:
            file.unlink()
        elif file.stat().st_size > state["events"][file.name]:
            os.truncate(file, state["events"][file.name])


def remove_unstarted(run):
    """Remove the folder of a new run that ended before its first checkpoint, unless it contains other files."""
    run = Path(run)
    remove_files([*temporary_files(run), *pictures_after(run, -1), *event_files(run)])
    remove_files([run / "hparams.json", run / ".lock"])
    for folder in (*(run / name for name in PICTURES), run / "results", run / "checkpoints", run):
        remove_if_empty(folder)


def temporary_files(run):
    """Return the temporary files that `write_atomically` may have left behind when the run was killed."""
    files = [run / "hparams.json", *(run / "checkpoints" / name for name in (CURRENT, WEIGHTS))]
    return [*(file.with_name(file.name + ".tmp") for file in files), *pictures_after(run, -1, ".tmp")]


def pictures_after(run, epoch, ending=""):
    """Return the files of the run's pictures of later epochs."""
    files = []
    for folder, name in PICTURES.items():
        for file in (run / folder).glob(name.format("*") + ending):
            before, after = (name + ending).split("{}")
            number = file.name[len(before):-len(after)]
            if number.isdecimal() and str(int(number)) == number and int(number) > epoch:
                files.append(file)
    return files


def remove_projector(run):
    """Remove the test codes that a finished run has written for TensorBoard's projector."""
    for folder in run.glob("[0-9][0-9][0-9][0-9][0-9]/codes"):
        remove_files(folder / name for name in PROJECTOR_FILES)
        remove_if_empty(folder)
        remove_if_empty(folder.parent)
    remove_files([run / "projector_config.pbtxt"])


def event_files(run):
    return [file for file in Path(run).glob("events.out.tfevents.*") if EVENT_FILE.fullmatch(file.name)]


def remove_files(files):
    for file in files:
        if file.is_file():
            file.unlink()


def remove_if_empty(folder):
    with suppress(OSError):  # it is not empty, or does not exist
        folder.rmdir()


def sync_event_files(run):
    """Force the run's event files to disk and return their sizes in bytes."""
    files = event_files(run)
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}
