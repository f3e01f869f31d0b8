"""Semantic segmentation: UPerNet on data in the layout of ADE20K."""

from oriented1d.segmentation.data import SegmentationData
from oriented1d.segmentation.module import SemanticSegmenter
from oriented1d.segmentation.upernet import UPerNet

__all__ = ["SegmentationData", "SemanticSegmenter", "UPerNet"]
