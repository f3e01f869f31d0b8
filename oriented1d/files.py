"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``output``, with the same ending, to write to; it becomes ``output`` at the end of the ``with``
    block, or is removed after an error."""
    path = Path(output)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
