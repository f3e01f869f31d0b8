"""Writing where the user asked to."""

from __future__ import annotations

import tempfile
from pathlib import Path

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
