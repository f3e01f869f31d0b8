"""``oriented1d benchmark depthwise``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from oriented1d.analysis import benchmark
from oriented1d.analysis.benchmark import depthwise
from oriented1d.analysis.benchmark.operator import ParityError


def test_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {name: [float(i)] * 3 for i, name in enumerate(("copy", "forward", "grad-input"), start=1)}
    times |= {"pytorch forward": [8.0] * 3, "pytorch grad-input": [12.0] * 3}
    ran: list[list[str]] = []

    def measured(functions, device, runs):
        for function in functions.values():
            function(0)
        ran.append(list(functions))
        return times

    monkeypatch.setattr(depthwise, "measure", measured)
    options = ["--device", "cpu", "--shapes", "2x8x9x7", "--dtypes", "float32", "bfloat16", "--kernel-size", "5"]
    assert benchmark.main(["depthwise", *options, "--output", str(tmp_path / "out.csv")]) == 0
    assert ran == [list(times)] * 2
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["dtype"], row["direction"]) for row in rows] == [
        ("float32", "forward"),
        ("float32", "grad-input"),
        ("bfloat16", "forward"),
        ("bfloat16", "grad-input"),
    ]
    assert all(row["shape"] == "2x8x9x7" and row["kernel_size"] == "5" for row in rows)
    assert [float(row["ratio_to_copy"]) for row in rows[:2]] == [2, 3]
    assert [float(row["ratio_to_pytorch"]) for row in rows[:2]] == [0.25, 0.25]
    assert "CPU" in rows[0]["device"]


def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = (torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    assert depthwise.check_parity(x, g, weight, bias) < 1e-6
    monkeypatch.setattr(depthwise, "_grad_input", lambda g, w: torch.ops.oriented1d.depthwise_conv2d(g, w, None))
    with pytest.raises(ParityError, match="relative errors"):
        depthwise.check_parity(x, g, weight, bias)


def test_pytorch_and_we_compute_the_same_gradient() -> None:
    x, g = (torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(4, 1, 3, 3)
    torch.testing.assert_close(depthwise._pytorch_grad_input(x, g, weight), depthwise._grad_input(g, weight))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    command = ["depthwise", "--shapes", "8x64x28x28", "--runs", "3", "--output", str(tmp_path / "out.csv")]
    assert benchmark.main(command) == 0
    with (tmp_path / "out.csv").open() as file:
        assert all(float(row["ms_p50"]) > 0 and float(row["pytorch_ms"]) > 0 for row in csv.DictReader(file))
