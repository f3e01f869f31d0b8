"""The layer: :class:`OrientedConv1d`; and what else our networks have, :class:`DepthwiseConv2d` and
:class:`PatchConv2d`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriented1d import geometry
from oriented1d.operator import depthwise, library, oriented_conv1d
from oriented1d.operator.layout import only_channels_last


class OrientedConv1d(nn.Module):
    """Depthwise 1D convolution of each channel along its own angle. See :func:`oriented1d.oriented_conv1d`.

    Input ``(N, C, H, W)``, output ``(N, C, ceil(H / stride), ceil(W / stride))``.

    The angles are those of :func:`oriented1d.geometry.layer_angles` unless ``angles`` gives them. They are kept in the
    buffer ``theta``, which stays float32 when the module is cast and is saved and loaded with the weights: what was
    loaded is what the layer does.

    Args:
        channels: number of channels ``C``.
        kernel_size: odd number of taps ``K``.
        stride: step of the output grid in pixels, both ways.
        num_directions: number of directions that the channels are shared out over.
        layer_offset: rotation of all directions, in half turns (0.5 is 90 degrees).
        angles: ``(C,)`` radians, instead of ``num_directions`` and ``layer_offset``.
        bias: learn a bias ``(C,)``.
        residual: add the input to the output.

    State dict: ``weight (C, 1, 1, K)``, ``bias (C,)``, ``theta (C,)`` in radians (``(C, 1)`` is read too).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that no layer has.

    Source: the paper's section 3; parameters are named and shaped as in the original implementation.
    """

    theta: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        num_directions: int = 8,
        layer_offset: float = 0.0,
        angles: Tensor | Sequence[float] | None = None,
        bias: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels),
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("num_directions", num_directions),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if angles is None:
            layer = geometry.directions(geometry.layer_angles(channels, num_directions, layer_offset))
        else:
            layer = geometry.directions(angles)
            if layer.channels != channels:
                raise ValueError(f"angles: expected one for each of the {channels} channels, got {layer.channels}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.residual = residual
        self.weight = nn.Parameter(torch.empty(channels, 1, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self._directions = layer.text
        self.register_buffer("theta", layer.per_channel())
        self._seen_version = self.theta._version
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` does a depthwise layer of this shape."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def angles(self) -> geometry.Directions:
        """The angles of the channels, run-length encoded."""
        return geometry.parse(self.directions())

    def directions(self) -> str:
        """The text of :attr:`angles`.

        A constant of compiled graphs: strings are what the guards of ``torch.compile`` check fastest.
        """
        # DistributedDataParallel writes buffers in place.
        if not torch.compiler.is_compiling() and self.theta._version != self._seen_version:
            self._read_angles()
        return self._directions

    def _read_angles(self) -> None:
        # Text beside the buffer: a constant to torch.compile (which guards it), free of device reads.
        if self.theta.is_meta:
            return
        self._directions = geometry.directions(self.theta).text
        self.theta = self.theta.to(torch.float32)
        self._seen_version = self.theta._version

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "theta"
        theta = state_dict.get(key)
        if theta is not None and theta.dim() == 2 and theta.shape[1] == 1:
            state_dict[key] = theta.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_angles()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrientedConv1d:
        # The angles outlive what happens to parameters: bfloat16 would round them, to_empty() would lose them.
        super()._apply(fn, recurse)
        plain_strides(self.weight)
        if not self.theta.is_meta:
            self.theta = geometry.parse(self._directions).per_channel().to(self.theta.device)
            self._seen_version = self.theta._version
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        angles = self.directions()
        return oriented_conv1d(input, self.weight, angles, self.bias, stride=self.stride, residual=self.residual)

    def extra_repr(self) -> str:
        directions = len(set(geometry.parse(self._directions).angles))
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"directions={directions}, bias={self.bias is not None}, residual={self.residual}"
        )


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)``, ``(N, C, H, W)`` to
    the same shape, with a kernel of ours where there is one (see :mod:`oriented1d.operator.depthwise`).

    Args:
        channels: number of channels ``C``.
        kernel_size: odd side of the kernels, in pixels.

    Raises:
        ValueError: the kernel size is even.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        reach = self.kernel_size[0] // 2
        # Somebody may have changed what they are in all convolutions of a network.
        as_made = self.stride == self.dilation == (1, 1) and self.padding == (reach, reach)
        if as_made and self.padding_mode == "zeros" and depthwise.supported(input, self.weight):
            return depthwise.depthwise_conv2d(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias)


class PatchConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, size, stride=size)``: a linear layer on patches of an image,
    ``(N, in_channels, H, W)`` to ``(N, out_channels, floor(H / size), floor(W / size))``.

    In channels_last and 16 bits on a GPU it is computed as one, unless it is compiled: cuDNN takes milliseconds of the
    host to choose what it does with a size of images that it has not seen, which is every other one where sizes change.

    Args:
        in_channels, out_channels: numbers of channels.
        size: side of a patch, in pixels.
        bias: learn a bias ``(out_channels,)``.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, size, stride=size, bias=bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchConv2d:
        super()._apply(fn, recurse)
        if self.kernel_size == (1, 1):
            plain_strides(self.weight)
        return self

    def _as_product(self, input: Tensor) -> bool:
        if torch.compiler.is_compiling() or not _cudnn_in_16_bits(input) or library._are_functorch_transforms_active():
            return False
        # Somebody may have changed what they are in all convolutions of a network.
        as_made = self.stride == self.kernel_size and self.padding == (0, 0) and self.dilation == (1, 1)
        # What a convolution refuses it refuses with a good message.
        if not as_made or input.dim() != 4 or input.shape[1] != self.in_channels:
            return False
        if min(input.shape[2:]) < self.kernel_size[0]:
            return False
        return only_channels_last(input)

    def forward(self, input: Tensor) -> Tensor:
        if not self._as_product(input):
            return super().forward(input)
        size, _ = self.kernel_size
        x, weight = input.permute(0, 2, 3, 1), self.weight
        if size == 1:
            weight = weight.flatten(1)  # its gradient has the strides that `plain_strides` is for
        else:
            n, height, width, c = x.shape
            rows, columns = height // size, width // size
            x = x[:, : rows * size, : columns * size].reshape(n, rows, size, columns, size * c)
            x = x.transpose(2, 3).reshape(n, rows, columns, size * size * c)
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, weight, self.bias).permute(0, 3, 1, 2)


def _cudnn_in_16_bits(input: Tensor) -> bool:
    # In float32 cuDNN takes TF32, which products of matrices take only if they are told to.
    return input.is_cuda and library.computed_dtype(input) in library.LOW_PRECISION


def plain_strides(weight: Tensor) -> None:
    """Give a weight whose kernels are one pixel high, or have one channel, the strides of contiguous tensors again.

    Those of the other format are the same memory, but DDP copies gradients whose strides are not the weight's.
    """
    if weight.stride() != torch.empty(weight.shape, device="meta").stride():
        weight.data = weight.data.view(-1).view(weight.shape)


def angle_buffers(module: nn.Module) -> list[str]:
    """Names of the angles of all oriented layers of a module.

    They never change, so :class:`torch.nn.parallel.DistributedDataParallel` need not send them to all processes before
    each step, after which each layer would read them back. It leaves out what its module lists as
    ``_ddp_params_and_buffers_to_ignore``.
    """
    named = module.named_modules()
    return [f"{name}.theta".removeprefix(".") for name, layer in named if isinstance(layer, OrientedConv1d)]
