"""Detections in COCO's format, and what COCO's evaluation says of them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from oriented1d.detection.cascade import Detections, paste
from oriented1d.files import unfinished

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def to_coco(
    detections: Detections, image_id: int, size: tuple[int, int], categories: list[int]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO's results.

    Args:
        detections: in pixels of the original image.
        image_id: of the image.
        size: its height and width, pixels.
        categories: number of each label.
    """
    masks = paste(detections.masks, detections.boxes, size).cpu().numpy().astype(np.uint8)
    results = []
    for mask, box, score, label in zip(
        masks, detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
    ):
        encoded = coco_mask.encode(np.asfortranarray(mask))
        results.append(
            {
                "image_id": image_id,
                "category_id": categories[label],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "segmentation": {"size": list(size), "counts": encoded["counts"].decode("ascii")},
            }
        )
    return results


def evaluate(annotations: COCO, results: list[dict[str, Any]], image_ids: list[int]) -> dict[str, float]:
    """``bbox_AP``, ``bbox_AP50``, ... and ``segm_AP``, ..., by pycocotools, over the given images; -1 where COCO has no
    objects of that size."""
    scores: dict[str, float] = {}
    for kind in ("bbox", "segm"):
        values = [0.0] * len(NAMES)
        if results:
            # loadRes adds to what it is given.
            found = [dict(result) for result in results]
            if kind == "segm":
                for result in found:
                    del result["bbox"]  # areas are those of the masks
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(annotations, annotations.loadRes(found), kind)
                evaluation.params.imgIds = image_ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = evaluation.stats[: len(NAMES)].tolist()
        scores |= {f"{kind}_{name}": value for name, value in zip(NAMES, values, strict=True)}
    return scores


def write_json(results: list[dict[str, Any]], path: Path) -> None:
    """Write results, whole or not at all."""
    with unfinished(path) as partial:
        partial.write_text(json.dumps(results), encoding="utf-8")
