"""``oriented1d benchmark segmentation`` and ``detection``."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from oriented1d.analysis import benchmark
from oriented1d.analysis.benchmark import dense
from oriented1d.detection.boxes import Matcher, overlaps
from oriented1d.detection.cascade import STAGE_OVERLAPS, RoIHead, RPNHead

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
def test_a_batch_has_a_loss_and_gradients_everywhere(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "PROPOSALS", 100)  # the stages take time on the CPU
    case = dataclasses.replace(CASE, task=task, model="convnext_atto_2d")
    model = dense._model(case).train()
    batch = dense._batch(case, 64, 96, torch.device("cpu"))
    images, truths = batch[:2]
    assert images.is_contiguous(memory_format=torch.channels_last)
    if task == "detection":
        for truth in truths:
            assert truth.masks.shape == (dense.OBJECTS, 64, 96)
            inside = truth.masks.sum((1, 2))
            sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
            assert torch.all((inside - sides.prod(1)).abs() <= sides.sum(1) + 1)
    loss = {"segmentation": dense._segmentation_loss, "detection": dense._detection_loss}[task](model, *batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    first = next(p for p in model.backbone.parameters() if p.dim() == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize(("height", "width"), [(64, 96), (800, 1344)])
def test_proposals_lie_in_the_image_and_have_positives_for_all_stages(height: int, width: int) -> None:
    _, truths, rois = dense._batch(CASE, height, width, torch.device("cpu"))
    assert rois[:, 0].tolist() == [0] * dense.PROPOSALS + [1] * dense.PROPOSALS
    assert (rois[:, 3:] > rois[:, 1:3]).all()
    assert (rois[:, 1:] >= 0).all()
    assert (rois[:, 3:] <= torch.tensor([width, height])).all()
    for truth, boxes in zip(truths, rois[:, 1:].split(dense.PROPOSALS), strict=True):
        most = overlaps(boxes, truth.boxes).amax(1)
        for threshold in STAGE_OVERLAPS:
            assert 128 < int((most >= threshold).sum()) < 600  # 128 positives are sampled
        # Sizes of COCO: 41% small, 34% medium, of images of 640x480.
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[500:] * 640 * 480 / (height * width)
        assert float((area < 32**2).float().mean()) == pytest.approx(0.41, abs=0.06)
        assert float((area < 96**2).float().mean()) == pytest.approx(0.75, abs=0.1)


def test_every_backbone_is_given_the_same_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage gets them, and after those of the network itself were computed."""
    computed: list[int] = []
    seen: list[tuple[torch.Tensor, ...]] = []
    compute = RPNHead.proposals

    def count(head, *arguments):
        rois, scores = compute(head, *arguments)
        computed.append(len(rois))
        return rois, scores

    def record(head, maps, rois, sides, truths, number):
        image = rois[:, 0].long()
        matches = Matcher(0.5, 0.5)(rois[:, None, 1:], truths.boxes[image], truths.exist[image])
        seen.append((rois, truths.rois, truths.labels, (matches >= 0).sum()))
        return {"loss": maps[0].mean()}

    monkeypatch.setattr(RPNHead, "proposals", count)
    monkeypatch.setattr(RoIHead, "losses", record)
    for model in ("convnext_atto_1d", "convnext_atto_2d"):
        case = dataclasses.replace(CASE, model=model, warmup=0, runs=1)
        dense.measure(case)
    one, other = seen
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(one[0]) == 2 * dense.PROPOSALS
    assert one[3] >= 2 * dense.PROPOSALS // 4
    assert min(computed) > 0
    assert max(computed) < 2 * dense.PROPOSALS


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
    assert (good["steady_s"], bad["steady_s"]) == ("0.08", "")  # four steps of 20 ms
    assert "4 sizes: 3.00 s, again 2.50 s" in capsys.readouterr().out
    assert (good["layout"], bad["layout"], bad["error"]) == ("contiguous", "channels_last", "out of memory")


def test_measured_on_the_cpu() -> None:
    result = dense.measure(dataclasses.replace(CASE, task="segmentation", sizes=1))
    assert len(result.ms) == 2
    assert min(result.ms) > 0
    assert result.peak_memory_mib is None
    assert result.changing is not None
    assert min(result.changing) > 0
