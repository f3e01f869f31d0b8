"""Memory of GPUs."""

from __future__ import annotations

import os

_VARIABLES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


def expect_changing_sizes() -> None:
    """Let PyTorch's segments of a GPU's memory grow in place.

    Else images of a new size, whose tensors fit in no segment that there is, make it ask the driver for further ones,
    for which the host waits, and leaves the old ones in pieces.

    Has no effect once this process has used a GPU, or where the environment (``PYTORCH_ALLOC_CONF``) says what to do.
    """
    if not any(name in os.environ for name in _VARIABLES):
        os.environ[_VARIABLES[0]] = "expandable_segments:True"
