"""Files that the user named: images to read, folders to write to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from timm.data import get_img_extensions

from oriented1d.training.errors import UserError


def check_writable(folder: str | Path, key: str) -> None:
    """Create ``folder`` if need be and try to write a file in it, so that a run does not find out at its end.

    Args:
        key: the option that ``folder`` came from, for the message.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key}: expected a folder that can be written to, got {folder} ({error.strerror})") from error


def find_images(paths: Sequence[str]) -> list[Path]:
    """The given files, and all image files in the given folders and below, in the order of their names.

    Raises:
        UserError: a path does not exist, or no image was found.
    """
    extensions = get_img_extensions(as_set=True)
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"data.images: expected image files or folders, got {path}, which does not exist")
    if not files:
        raise UserError(f"data.images: no image files in {', '.join(map(str, paths))}")
    return files
