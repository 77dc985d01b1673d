"""Atomic writing of files, and images as files."""

import io
import os
from contextlib import suppress
from pathlib import Path

from torchvision.utils import make_grid


def write_atomically(path, content, keep=None):
    """Write bytes to a file atomically: at any time, it has either all of them or its previous content.

    The previous content is kept as the file `keep`, if given. The file's folder is created if it is missing, but not
    the folder's parent: a run's folder that somebody has removed does not come back incomplete.
    Raises OSError with the path as its `filename`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # exists only if something failed
            temporary.unlink()


def sync(path):
    """Force a file, or the names in a folder, to disk (fsync). Does nothing on Windows, which cannot sync folders."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
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
