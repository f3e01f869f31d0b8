"""ConvNeXt with oriented 1D kernels: the networks of the paper's figure 3, registered with timm.

A network is named ``convnext_{size}_{kernels}``. Its kernels are one of

- ``2d``: the 7x7 kernels of ConvNeXt;
- ``1d``: oriented kernels instead, in a stem made of them and in every block;
- ``1dpp`` and ``2dpp``: as ``1d`` and ``2d``, with a second, oriented layer inside each block.

Modules are named and shaped as in the original implementation, so that its checkpoints load as they are.

Layers over channels (LayerNorm, Linear) work on ``(N, H, W, C)`` views. A channels_last tensor has that order in memory
already, so nothing is copied: from the stem's first LayerNorm on, activations are channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d, trunc_normal_
from timm.models import (
    FeatureInfo,
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from oriented1d.layers import DepthwiseConv2d, OrientedConv1d, PatchConv2d, angle_buffers
from oriented1d.operator import stem

__all__ = ["DENSE_KERNEL_SIZES", "KERNEL_SIZES", "SIZES", "ConvNeXt", "ConvNeXtFeatures"]

# Depths and widths of the four stages, those of timm's ConvNeXt of the same name.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}

# Kernel sizes of a block's depthwise layers. The first is also that of the 1D stem.
KERNEL_SIZES: dict[str, tuple[int, ...]] = {"2d": (7,), "2dpp": (7, 31), "1d": (31,), "1dpp": (15, 31)}

# The same for each stage of a backbone for detection or segmentation.
DENSE_KERNEL_SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "2d": ((7,), (7,), (7,), (7,)),
    "2dpp": ((7, 31), (7, 31), (7, 27), (7, 13)),
    "1d": ((31,), (31,), (27,), (13,)),
    "1dpp": ((15, 31), (15, 31), (15, 27), (13, 13)),
}


# Strides of the two oriented layers of the 1D stem, and size of the 2D stem's kernel, for each stride of the stem. The
# 2D stem is padded by (size - stride) / 2: at stride 4 not at all, as in ConvNeXt. A kernel that shrank with the stride
# would see a single pixel at stride 1, and the LayerNorm after it would take away how bright a grey pixel is.
_STEM_STRIDES: dict[int, tuple[int, int]] = {4: (2, 2), 2: (2, 1), 1: (1, 1)}
_STEM_KERNELS: dict[int, int] = {4: 4, 2: 4, 1: 3}


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that keeps a low precision: under autocast the output of ``nn.LayerNorm`` is float32, which the layer
    after it rounds again. Statistics are float32 in both."""

    def forward(self, input: Tensor) -> Tensor:
        device_type = input.device.type
        if input.dtype not in (torch.bfloat16, torch.float16) or not torch.is_autocast_enabled(device_type):
            return super().forward(input)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class OrientedStem(nn.Module):
    """Stem of oriented kernels: ``(N, in_chans, H, W)`` to ``(N, C, ceil(H / S), ceil(W / S))``.

    Args:
        in_chans: channels of the image.
        stem_dim: channels of the two oriented layers.
        dim: channels ``C`` of the output.
        kernel_size: odd size of both oriented layers.
        num_directions: directions of both.
        layer_offset: rotation of the second one, in half turns.
        strides: of the two; ``S`` is their product.
    """

    def __init__(
        self,
        in_chans: int,
        stem_dim: int,
        dim: int,
        kernel_size: int,
        num_directions: int,
        layer_offset: float,
        strides: tuple[int, int],
    ) -> None:
        super().__init__()
        self.pw1 = nn.Linear(in_chans, stem_dim)
        self.dw1 = OrientedConv1d(stem_dim, kernel_size, strides[0], num_directions)
        self.norm1 = LayerNorm(stem_dim, eps=1e-6)
        self.dw2 = OrientedConv1d(stem_dim, kernel_size, strides[1], num_directions, layer_offset)
        self.norm2 = LayerNorm(stem_dim, eps=1e-6)
        self.pw2 = nn.Linear(stem_dim, dim)
        self.norm3 = LayerNorm(dim, eps=1e-6)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        pw, dw, norm = self.pw1, self.dw1, self.norm1
        # An export may have put other modules in their place.
        if isinstance(dw, OrientedConv1d) and stem.supported(x, dw.weight, dw.directions(), dw.stride):
            parameters = pw.weight, pw.bias, dw.weight, dw.directions(), dw.bias, norm.weight, norm.bias
            x = stem.oriented_stem(x, *parameters, norm.eps, dw.stride)
        else:
            x = _nchw(self.act(norm(_nhwc(dw(_nchw(pw(_nhwc(x))))))))
        x = self.act(self.norm2(_nhwc(self.dw2(x))))
        return _nchw(self.norm3(self.pw2(x)))


class Block(nn.Module):
    """Residual block, ``(N, C, H, W)`` to the same shape: depthwise, LayerNorm, Linear, GELU, [oriented,] Linear.

    Args:
        dim: channels ``C``.
        kernels: ``"2d"``, ``"2dpp"``, ``"1d"`` or ``"1dpp"``.
        kernel_sizes: size of the depthwise layer, and of the oriented layer after GELU where there is one.
        num_directions: directions of the oriented layers.
        layer_offset: rotation of the oriented layers, in half turns.
        drop_path: probability to skip the block in training.
        layer_scale_init_value: initial scale of the branch; 0 for no scale.
    """

    def __init__(
        self,
        dim: int,
        kernels: str,
        kernel_sizes: Sequence[int],
        num_directions: int,
        layer_offset: float,
        drop_path: float,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()

        def oriented(channels: int, kernel_size: int, residual: bool) -> OrientedConv1d:
            return OrientedConv1d(
                channels,
                kernel_size,
                num_directions=num_directions,
                layer_offset=layer_offset,
                residual=residual,
            )

        size = kernel_sizes[0]
        depthwise: nn.Module
        if kernels.startswith("1d"):
            depthwise = oriented(dim, size, residual=False)
        else:
            depthwise = DepthwiseConv2d(dim, size)
        self.twice = kernels.endswith("pp")
        if self.twice:
            self.dwconv1 = depthwise
            self.dwconv2 = oriented(4 * dim, kernel_sizes[1], residual=True)
        else:
            self.dwconv = depthwise
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv1(x) if self.twice else self.dwconv(x)
        x = self.act(self.pwconv1(self.norm(_nhwc(x))))
        if self.twice:
            x = _nhwc(self.dwconv2(_nchw(x)))
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + self.drop_path(_nchw(x))


class Stage(nn.Sequential):
    """Blocks of one stage."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_seq(self, x) if self.grad_checkpointing else super().forward(x)


class ConvNeXt(nn.Module):
    """ConvNeXt with 2D or oriented 1D kernels; images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

    Build one with ``timm.create_model("convnext_tiny_1d", ...)``, which takes all arguments but ``kernels``.

    Stage ``i`` has ``dims[i]`` channels at 1 / 4, 8, 16 and 32 of the image's size (with ``stem_stride`` 2 at 1 / 2, 4,
    8 and 16, and so on). Sizes that are not multiples of these work: the 1D stem rounds them up, every other layer
    rounds them down.

    Args:
        kernels: ``"2d"``, ``"2dpp"``, ``"1d"`` or ``"1dpp"``.
        in_chans: channels of the images.
        num_classes: number of classes; 0 for no classifier, which gives the features before it.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for no pooling, which gives ``(N, classes, H, W)``.
        depths: number of blocks of each of the four stages.
        dims: channels of each stage.
        kernel_sizes: for each stage a list of the odd sizes of its depthwise layers: one, or two for ``1dpp`` and
            ``2dpp``. The stem keeps its own size (31 for ``1d``, 15 for ``1dpp``).
        num_directions: directions of every oriented layer, the stem's included.
        layer_offset: rotation of every second oriented layer (those of odd blocks, and the second of the stem), in half
            turns: 0.5 is 90 degrees, 0 turns none.
        stem_dim: channels inside the 1D stem.
        stem_stride: 4, or 2 or 1 for small images: step of the first stage's pixels in those of the image. All weights
            have the same shapes, but for those of the 2D stem at stride 1, whose kernel is 3x3.
        layer_scale_init_value: initial scale of each block's branch; 0 for no scale.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Raises:
        ValueError: an argument has a value that no network has.

    Source: the paper's figure 3 and the original implementation.
    """

    def __init__(
        self,
        kernels: str = "1d",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = SIZES["tiny"][0],
        dims: Sequence[int] = SIZES["tiny"][1],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        num_directions: int = 8,
        layer_offset: float = 0.5,
        stem_dim: int = 64,
        stem_stride: int = 4,
        layer_scale_init_value: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if kernels not in KERNEL_SIZES:
            raise ValueError(f"kernels: expected one of {', '.join(KERNEL_SIZES)}, got {kernels!r}")
        for name, value in (("depths", depths), ("dims", dims)):
            if len(value) != 4 or min(value) < 1:
                raise ValueError(f"{name}: expected four positive numbers, one for each stage, got {value}")
        if stem_stride not in _STEM_STRIDES:
            raise ValueError(f"stem_stride: expected 4, 2 or 1, got {stem_stride!r}")
        if kernel_sizes is None:
            kernel_sizes = [KERNEL_SIZES[kernels]] * 4
        _check_kernel_sizes(kernels, kernel_sizes)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        stem: nn.Module
        if kernels.startswith("1d"):
            size, strides = KERNEL_SIZES[kernels][0], _STEM_STRIDES[stem_stride]
            stem = OrientedStem(in_chans, stem_dim, dims[0], size, num_directions, layer_offset, strides)
        else:
            size = _STEM_KERNELS[stem_stride]
            conv: nn.Module
            if size == stem_stride:
                conv = PatchConv2d(in_chans, dims[0], size)
            else:
                conv = nn.Conv2d(in_chans, dims[0], size, stem_stride, padding=(size - stem_stride) // 2)
            stem = nn.Sequential(conv, LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(before, eps=1e-6), PatchConv2d(before, after, 2)))

        drop_paths = iter(drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            Stage(
                *(
                    Block(
                        dims[i],
                        kernels,
                        kernel_sizes[i],
                        num_directions,
                        layer_offset=layer_offset * (block % 2),
                        drop_path=next(drop_paths),
                        layer_scale_init_value=layer_scale_init_value,
                    )
                    for block in range(depths[i])
                )
            )
            for i in range(4)
        )

        self.norm: nn.Module = LayerNorm(dims[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)
        self._ddp_params_and_buffers_to_ignore = angle_buffers(self)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, beside those of one dimension (layer scales, norms, biases): none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names that form a group: blocks (with the layer that leads to them), or stages."""
        if coarse:
            return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:downsample_layers|stages)\.(\d+)"}
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks a second time in the backward pass rather than keep what is inside them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, a Linear, or an Identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, and the pooling before it unless ``global_pool`` is None."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            _init_weights(self.head)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages ``indices`` (the last ones, if a number) do not need; their indices are returned."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.downsample_layers = self.downsample_layers[: last + 1]
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the last of them first unless ``intermediates_only``.

        Args:
            x: images ``(N, in_chans, H, W)``.
            indices: the stages wanted; a number means the last ones, None all.
            norm: apply the final norm to the last stage's output.
            stop_early: leave out the stages after the last one wanted.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            if stop_early and i > last:
                break
            x = stage(downsample(x))
            if i in take:
                intermediates.append(_nchw(self.norm(_nhwc(x))) if norm and i == len(self.stages) - 1 else x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W)`` to the last stage's output, ``(N, dims[3], H / 32, W / 32)`` with a stem of
        stride 4."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's output to logits ``(N, num_classes)``, or to the classifier's input if ``pre_logits``."""
        x = self.global_pool(x)
        pooled = x.dim() == 2
        x = self.head_drop(self.norm(x if pooled else _nhwc(x)))
        if not pre_logits:
            x = self.head(x)
        return x if pooled else _nchw(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_kernel_sizes(kernels: str, kernel_sizes: Sequence[Sequence[int]]) -> None:
    layers = len(KERNEL_SIZES[kernels])
    four = isinstance(kernel_sizes, Sequence) and len(kernel_sizes) == 4
    if not four or not all(
        isinstance(sizes, Sequence) and len(sizes) == layers and all(size % 2 for size in sizes)
        for sizes in kernel_sizes
    ):
        number = "one odd number" if layers == 1 else "two odd numbers"
        raise ValueError(
            f"kernel_sizes: expected a list of {number} for each of the four stages of a {kernels} network, "
            f"as in {[list(sizes) for sizes in DENSE_KERNEL_SIZES[kernels]]}, got {kernel_sizes}"
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear | OrientedConv1d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXtFeatures(nn.Module):
    """A network without classifier and final norm; images to the list of its stage outputs.

    This is what ``timm.create_model(..., features_only=True)`` returns. The modules that stay keep their names.
    ``feature_info`` has the channels and the reductions of the outputs.

    Args:
        model: the network, which is taken apart.
        out_indices: stages whose outputs are returned, from the first to the last; a number means the last ones.
        output_norms: a LayerNorm over channels ``norm{i}`` on each output, as detection and segmentation have them.
    """

    def __init__(
        self, model: ConvNeXt, out_indices: int | Sequence[int] = (0, 1, 2, 3), output_norms: bool = False
    ) -> None:
        super().__init__()
        indices = out_indices if isinstance(out_indices, int) else list(out_indices)
        self.out_indices = sorted(model.prune_intermediate_layers(indices, prune_norm=True))
        self.feature_info = FeatureInfo(model.feature_info, tuple(self.out_indices))
        self.output_norms = output_norms
        self.downsample_layers = model.downsample_layers
        self.stages = model.stages
        if output_norms:
            for i in self.out_indices:
                self.add_module(f"norm{i}", LayerNorm2d(model.feature_info[i]["num_chs"], eps=1e-6))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks a second time in the backward pass rather than keep what is inside them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            if i in self.out_indices:
                features.append(self.get_submodule(f"norm{i}")(x) if self.output_norms else x)
        return features


def _create_convnext(
    name: str, kernels: str, pretrained: bool, output_norms: bool = False, **kwargs: Any
) -> ConvNeXt | ConvNeXtFeatures:
    feature_cfg: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "feature_cls": ConvNeXtFeatures}
    if output_norms:
        if not kwargs.get("features_only"):
            raise ValueError("output_norms: expected features_only=True beside it; a classifier has its own norm")
        feature_cfg["output_norms"] = True
    return build_model_with_cfg(ConvNeXt, name, pretrained, kernels=kernels, feature_cfg=feature_cfg, **kwargs)


def _cfg(kernels: str) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.pw1" if kernels.startswith("1d") else "downsample_layers.0.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {f"convnext_{size}_{kernels}": _cfg(kernels) for size in SIZES for kernels in KERNEL_SIZES}
)


def _register(size: str, kernels: str) -> None:
    name = f"convnext_{size}_{kernels}"
    depths, dims = SIZES[size]

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> ConvNeXt | ConvNeXtFeatures:
        return _create_convnext(name, kernels, pretrained, **{"depths": depths, "dims": dims, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"ConvNeXt {size} with {kernels} kernels. See :class:`ConvNeXt` for the arguments."
    globals()[name] = register_model(entrypoint)


for _size in SIZES:
    for _kernels in KERNEL_SIZES:
        _register(_size, _kernels)
