"""Files: written atomically and read with their checksums; a run's folder."""

import contextlib
import errno
import io
import os
import time
import zipfile
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from training.cli import NO_MEMORY, UserError, warn

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

REFUSED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what file systems without fsync answer
OUR_EVENTS = ".aae"  # how the names of a run's event files end; nobody else's are changed
WEIGHTS = "model_checkpoint.pt"  # a run's weights, for other uses


def write_atomically(path, content):
    """Write bytes to a file atomically: at any time, it has either all of them or its previous content."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)  # not its parents: a run's folder that somebody removed does not come back
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            sync(file)
        replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # which the system does not name when a disk is full
        raise
    finally:
        with contextlib.suppress(OSError):  # exists only if something failed
            temporary.unlink()


def sync(file):
    """Force a file to disk, unless its file system refuses to, such as FUSE or CIFS."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in REFUSED:
            raise


def replace(source, target):
    """Rename a file; if that is refused, as on Windows while another program reads it, try again for two seconds."""
    for _ in range(40):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    return os.replace(source, target)


def serialize(value):
    """Return the bytes of a file: of a PNG for a PIL image, and what torch.save writes for anything else."""
    content = io.BytesIO()
    if isinstance(value, Image.Image):
        value.save(content, "png")
    else:
        torch.save(value, content)
    return content.getvalue()


def load_checked(path, advice="name another file", content=None):
    """Return what torch.save wrote to a file, on the CPU; UserError if it is damaged. `content`: its bytes, if read."""
    try:
        stream = io.BytesIO(Path(path).read_bytes() if content is None else content)
        with zipfile.ZipFile(stream) as archive:  # the format of torch.save; torch.load ignores checksums
            if not archive.testzip():
                stream.seek(0)
                return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds of errors for invalid files
        if isinstance(error, (OSError, MemoryError)) or NO_MEMORY.search(str(error)):
            raise
    raise UserError(f"{path} is damaged, or not a checkpoint; {advice}")


def create_run_folder(log_dir):
    """Create <log_dir>/<YYYY_mm_dd_HH_MM_SS>/ and return its path. If it exists, wait for the next second."""
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    while True:
        run = Path(log_dir) / datetime.now().strftime("%Y_%m_%d_%H_%M_%S")
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            return run
        time.sleep(0.1)


@contextlib.contextmanager
def locked(folder):
    """Lock a run's folder; raise UserError if another process has locked it."""
    with open(folder / ".lock", "wb") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait until it ends, or stop it") from None
        except OSError as error:  # a file system without locks
            warn(f"{folder} cannot be locked ({error.strerror}); make sure that no other process resumes it")
        yield


def rewind(folder, sizes):
    """Cut a run's event files to their sizes, by name: what was logged since then is logged again."""
    for name, size in sizes.items():
        if os.path.isfile(folder / name) and os.path.getsize(folder / name) > size:
            os.truncate(folder / name, size)


def sync_event_files(folder):
    """Force a run's event files to disk, and return their sizes in bytes by name."""
    sizes = {}
    for path in folder.glob(f"events.out.tfevents.*{OUR_EVENTS}"):
        with open(path, "ab") as file:
            sync(file)
        sizes[path.name] = os.path.getsize(path)
    return sizes
