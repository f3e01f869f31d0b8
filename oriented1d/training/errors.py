"""The error of a run that cannot go on because of what it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input. The message is one line that names the option or file, what was expected and what came.

    The command line prints the message alone and exits with code 1.
    """


@contextlib.contextmanager
def blamed_on(option: str) -> Iterator[None]:
    """Turn errors about a file or a value into a :class:`UserError` that names the option they came with."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {error}") from error
