"""``oriented1d benchmark segmentation`` and ``detection``."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from oriented1d.analysis import benchmark
from oriented1d.analysis.benchmark import dense

CASE = dense.Case("detection", "convnext_atto_1d", 2, 64, 96, "float32", "channels_last", "cpu", 1, 2, 0)


def test_changing_sizes_are_multiples_of_32_and_differ() -> None:
    sizes = list(dense.sizes(50, 800, 1344))
    assert sizes == list(dense.sizes(50, 800, 1344))
    assert len(set(sizes)) > 30
    assert all(side % 32 == 0 and side >= 32 for size in sizes for side in size)
    assert max(max(size) for size in sizes) <= 1344
    assert min(min(size) for size in sizes) >= 0.6 * 0.8 * 800 - 16
    assert {height > width for height, width in sizes} == {True, False}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_batch_has_a_loss_and_gradients_everywhere(task: str) -> None:
    case = dataclasses.replace(CASE, task=task, model="convnext_atto_2d")
    model = dense._model(case).train()
    images, truths = dense._batch(case, 64, 96, torch.device("cpu"))
    assert images.is_contiguous(memory_format=torch.channels_last)
    if task == "detection":
        for truth in truths:
            assert truth.masks.shape == (dense.OBJECTS, 64, 96)
            inside = truth.masks.sum((1, 2))
            sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
            assert torch.all((inside - sides.prod(1)).abs() <= sides.sum(1) + 1)
    loss = {"segmentation": dense._segmentation_loss, "detection": dense._detection_loss}[task](model, images, truths)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    first = next(p for p in model.backbone.parameters() if p.dim() == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    measured = dense.DenseMeasurement([10.0, 20.0, 40.0], 512.0, (3.0, 2.5))
    answers = iter([measured, "out of memory"])
    monkeypatch.setattr(dense, "isolated", lambda function, case: next(answers))
    out = tmp_path / "dense.csv"
    options = ["--device", "cpu", "--size", "64x96", "--batch-size", "2", "--changing-sizes", "4", "--output", str(out)]
    assert benchmark.main(["detection", "convnext_atto_1d", *options]) == 1
    good, bad = csv.DictReader(out.open())
    assert (good["img_per_s_p50"], good["ms_p50"], good["peak_memory_mib"]) == ("100.00", "20.000", "512")
    assert (good["changing_first_s"], good["changing_again_s"], good["size"]) == ("3.00", "2.50", "64x96")
    assert (good["layout"], bad["layout"], bad["error"]) == ("contiguous", "channels_last", "out of memory")


def test_measured_on_the_cpu() -> None:
    result = dense.measure(dataclasses.replace(CASE, task="segmentation", sizes=1))
    assert len(result.ms) == 2
    assert min(result.ms) > 0
    assert result.peak_memory_mib is None
    assert result.changing is not None
    assert min(result.changing) > 0
