"""Object detection and instance segmentation: Cascade Mask R-CNN on data in the layout of COCO."""

from oriented1d.detection.cascade import CascadeMaskRCNN, Settings
from oriented1d.detection.data import DetectionData
from oriented1d.detection.module import ObjectDetector

__all__ = ["CascadeMaskRCNN", "DetectionData", "ObjectDetector", "Settings"]
