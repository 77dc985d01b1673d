"""Files of a run: written atomically; images as PNG files."""

import contextlib
import errno
import io
import os
import time
from pathlib import Path

from torchvision.utils import make_grid

from training.cli import UserError

ADVICE = "free disk space, check the permissions, or choose another folder"
FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG") if hasattr(errno, name)}


@contextlib.contextmanager
def writing(folder):
    """Raise UserError for errors of writing to a folder: of a file in it, or of the disk. Other errors pass through."""
    try:
        yield
    except OSError as error:
        path = os.fsdecode(error.filename) if error.filename else str(folder)
        inside = error.filename and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
        if not inside and error.errno not in FULL:
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}; {ADVICE}") from None


def write_atomically(path, content):
    """Write bytes to a file atomically: at any time, it has either all of them or its previous content.

    The file's folder is created if it is missing, but not the folder's parent: a run's folder that somebody has removed
    does not come back incomplete. Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; {ADVICE}") from None
    finally:
        with contextlib.suppress(OSError):  # exists only if something failed
            temporary.unlink()


def replace(source, target):
    """Rename a file; if that is refused, as on Windows while another program reads it, try again for two seconds."""
    end = time.monotonic() + 2
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def sync_folder(folder):
    """Force the names in a folder to disk, where the system can: Windows and some shared folders cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def png_bytes(picture):
    """Return a PIL image as the content of a PNG file."""
    content = io.BytesIO()
    picture.save(content, "png")
    return content.getvalue()


def image_grid(images, columns):
    """Return images [N, 1, 28, 28] in [-1, 1] as one picture with `columns` per row, uint8 [3, H, W], on the CPU."""
    grid = make_grid(images.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1))
    return (255 * grid).round().byte()
