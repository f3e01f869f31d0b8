"""Image classification: the network with its recipe, the data, the predictions."""

from oriented1d.classification.data import Digits, ImageData
from oriented1d.classification.module import ImageClassifier

__all__ = ["Digits", "ImageClassifier", "ImageData"]
