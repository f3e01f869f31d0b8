"""Settings of PyTorch's allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oriented1d.detection import ObjectDetector
from oriented1d.training.memory import expect_changing_sizes


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_the_environment_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for either in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(either, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    expect_changing_sizes()
    assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == {name: "max_split_size_mb:64"}


def test_a_detector_expects_changing_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    ObjectDetector("convnext_atto_1d", channels=8, hidden=8)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.gpu
def test_settings_reach_the_allocator() -> None:
    script = """
import torch
from oriented1d.training.memory import expect_changing_sizes
expect_changing_sizes()
torch.zeros(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True"]
