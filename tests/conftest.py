"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of outputs of the original implementation, kept beside the repository."""
    folder = REPOSITORY.parent / "shared" / "goldens"
    if not folder.is_dir():
        pytest.skip("the goldens are not beside the repository (../shared/goldens)")
    return folder


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _alone() -> None:
    """The same seed for every test, and the same number of threads: runs with ``--threads`` set it for the process."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
