"""The operator: ``functional`` (what users call), ``library`` (registration, autograd), one module for each backend."""

from oriented1d.operator.functional import oriented_conv1d
from oriented1d.operator.library import use_backend

__all__ = ["oriented_conv1d", "use_backend"]
