import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from oriented1d.detection.cascade import Detections
from oriented1d.detection.data import TestSet as ImagesToTest
from oriented1d.detection.data import TrainSet, check_images, objects, read_annotations, train_batch
from oriented1d.detection.results import evaluate, to_coco
from oriented1d.detection.transforms import Sample, TrainTransform, crop, mirror, pad, resize
from oriented1d.training.batches import GroupedSampler, Lists
from oriented1d.training.errors import UserError
from oriented1d.training.schedule import warmup_steps_down

SIDES = {"short_sides": (80, 96), "longest": 160, "before_crop": (96, 120), "crop": (64, 96)}


@pytest.fixture
def annotations(shapes: Path) -> COCO:
    return read_annotations(shapes / "annotations" / "instances_train2017.json")


def one() -> Sample:
    """A rectangle of columns 10..29 and rows 20..29 in an image of 60 x 50."""
    image, mask = np.zeros((50, 60, 3), np.uint8), np.zeros((1, 50, 60), np.uint8)
    image[20:30, 10:30] = 255
    mask[0, 20:30, 10:30] = 1
    return Sample(image, np.array([[10, 20, 30, 30]], np.float32), np.array([1]), mask)


def test_boxes_and_masks_follow_the_image() -> None:
    flipped = mirror(one())
    assert flipped.boxes.tolist() == [[30, 20, 50, 30]]
    large = resize(one(), 1000, 100)
    assert large.image.shape == (100, 120, 3)
    assert large.boxes.tolist() == [[20, 40, 60, 60]]
    part = crop(one(), 15, 20, 30, 30)
    assert part.boxes.tolist() == [[0, 5, 10, 15]]
    assert len(crop(one(), 30, 0, 20, 60).boxes) == 0
    for sample in (flipped, large, part):
        x0, y0, x1, y1 = sample.boxes[0].astype(int)
        inside = np.zeros(sample.image.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        assert np.array_equal(sample.masks[0].astype(bool), inside)
        assert (sample.image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] == 255).all()


def test_objects_of_an_image(annotations: COCO) -> None:
    labels = {3: 0, 7: 1}
    for image in annotations.dataset["images"]:
        boxes, classes, masks = objects(annotations, image, labels)
        truths = annotations.imgToAnns[image["id"]]
        assert len(boxes) == len(classes) == len(masks) == len(truths)
        for truth, box, label, mask in zip(truths, boxes, classes, masks, strict=True):
            x, y, w, h = truth["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
            assert label == labels[truth["category_id"]]
            assert mask.shape == (image["height"], image["width"])
            assert mask.sum() == truth["area"]


def test_what_is_left_out(annotations: COCO) -> None:
    image = annotations.dataset["images"][0]
    good = dict(annotations.imgToAnns[image["id"]][0])
    variants = [{"iscrowd": 1}, {"ignore": 1}, {"area": 0}, {"bbox": [5, 5, 0.5, 9]}, {"bbox": [500, 5, 9, 9]}]
    stub = SimpleNamespace(imgToAnns={image["id"]: [good, *({**good, **change} for change in variants)]})
    assert len(objects(stub, image, {3: 0, 7: 1})[0]) == 1
    runs = coco_mask.decode(coco_mask.frPyObjects({"size": [4, 3], "counts": [2, 3, 7]}, 4, 3))
    raw = {**good, "segmentation": {"size": [4, 3], "counts": [2, 3, 7]}, "bbox": [0, 0, 2, 4], "area": 3}
    stub = SimpleNamespace(imgToAnns={1: [raw]})
    masks = objects(stub, {"id": 1, "height": 4, "width": 3}, {3: 0, 7: 1})[2]
    assert np.array_equal(masks[0], runs)
    assert masks.sum() == 3


def test_train_set(shapes: Path, annotations: COCO) -> None:
    transform = TrainTransform(**SIDES)
    data = TrainSet(shapes / "train2017", annotations, transform, seed=0, keep_empty=False)
    assert len(data) == 11
    assert len(TrainSet(shapes / "train2017", annotations, transform, 0, keep_empty=True)) == 12
    for i in range(33):
        image, truth = data[i]
        assert image.shape[0] == 3
        assert truth.masks.shape == (len(truth.boxes), *image.shape[1:])
        for box, mask in zip(truth.boxes, truth.masks, strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            if len(ys) == 0:
                continue  # a corner of a disc's box
            assert xs.min() >= box[0] - 1.5
            assert xs.max() <= box[2] + 1
            assert ys.min() >= box[1] - 1.5
            assert ys.max() <= box[3] + 1
    again = TrainSet(shapes / "train2017", annotations, transform, seed=0, keep_empty=False)
    assert torch.equal(again[15][0], data[15][0])
    assert again[15][0].shape != data[4][0].shape or not torch.equal(again[15][0], data[4][0])


def test_batches(shapes: Path, annotations: COCO) -> None:
    data = TrainSet(shapes / "train2017", annotations, TrainTransform(**SIDES), seed=0, keep_empty=False)
    batch = train_batch([data[0], data[1]])
    assert batch["images"].shape[2] % 32 == batch["images"].shape[3] % 32 == 0
    for i, (height, width) in enumerate(batch["sizes"]):
        assert (batch["images"][i, :, height:] == 0).all()
        assert (batch["images"][i, :, :, width:] == 0).all()
        assert batch["masks"][i].shape[1:] == batch["images"].shape[2:]
    assert pad([torch.ones(3, 33, 5)]).shape == (1, 3, 64, 32)

    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    trainer = SimpleNamespace(
        world_size=1, global_rank=0, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    )
    groups = [0, 1] * 10
    batches = GroupedSampler(range(20), trainer, 3, 0, groups)
    first = list(batches)
    assert len(first) == len(batches) == 6
    assert sum(len({groups[sample % 20] for sample in part}) == 1 for part in first) >= 5
    assert len({sample for part in first for sample in part}) == 18
    assert Lists(range(100))[first[0]] == first[0]
    progress.current.ready = 2
    assert list(batches) == first[2:]


def test_images_to_test(shapes: Path) -> None:
    data = ImagesToTest([(shapes / "val2017" / "0001.png", 11)], 1333, 192, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert data[0]["image"].shape == (3, 192, 256)
    assert data[0]["size"] == (96, 128)
    assert data[0]["scale"] == (2.0, 2.0)
    assert data[0]["id"] == 11


def test_bad_files_are_named(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    shutil.copytree(shapes, root)
    (root / "train2017" / "0003.png").unlink()
    (root / "train2017" / "0004.png").write_bytes(b"no image")
    annotations = read_annotations(root / "annotations" / "instances_train2017.json")
    with pytest.raises(UserError, match=r"2 bad images: .*0003\.png \(missing\); .*0004\.png \(cannot be read"):
        check_images(root / "train2017", annotations)
    with pytest.raises(UserError, match=r"expected the annotations .*which does not exist"):
        read_annotations(root / "none.json")
    (root / "broken.json").write_text(json.dumps({"images": []}))
    with pytest.raises(UserError, match=r"broken\.json: expected COCO's format"):
        read_annotations(root / "broken.json")


def test_evaluation_is_pycocotools(shapes: Path) -> None:
    """Perfect detections score 1; shifted ones what COCOeval says of them."""
    annotations = read_annotations(shapes / "annotations" / "instances_val2017.json")
    ids = sorted(annotations.imgs)

    def results(shift: float) -> list[dict]:
        found = []
        for number in ids:
            image = annotations.imgs[number]
            boxes, labels, _ = objects(annotations, image, {3: 0, 7: 1})
            masks = torch.ones(len(boxes), 28, 28)
            shifted = torch.from_numpy(boxes) + shift
            detections = Detections(shifted, torch.linspace(0.9, 0.5, len(boxes)), torch.from_numpy(labels), masks)
            found += to_coco(detections, number, (image["height"], image["width"]), [3, 7])
        return found

    exact = evaluate(annotations, results(0.0), ids)
    assert exact["bbox_AP"] == pytest.approx(1.0)
    assert exact["segm_AP50"] == pytest.approx(1.0)
    assert 0 < exact["segm_AP"] < 1.0  # discs are not rectangles
    shifted = results(4.0)
    scores = evaluate(annotations, shifted, ids)
    boxes = annotations.loadRes([{k: v for k, v in r.items() if k != "segmentation"} for r in shifted])
    reference = COCOeval(annotations, boxes, "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    assert scores["bbox_AP"] == pytest.approx(reference.stats[0], abs=1e-9)
    assert scores["bbox_AP75"] == pytest.approx(reference.stats[2], abs=1e-9)
    assert 0 < scores["bbox_AP"] < exact["bbox_AP"]
    assert evaluate(annotations, [], ids)["bbox_AP"] == 0


def test_schedule() -> None:
    assert warmup_steps_down(0, 500, [1000, 2000]) == pytest.approx(1e-3)
    assert warmup_steps_down(250, 500, [1000, 2000]) == pytest.approx(0.5005)
    assert warmup_steps_down(999, 500, [1000, 2000]) == 1
    assert warmup_steps_down(1000, 500, [1000, 2000]) == pytest.approx(0.1)
    assert warmup_steps_down(2000, 500, [1000, 2000]) == pytest.approx(0.01)
