"""Parameter groups: weight decay by shape, learning rate by depth. And which AdamW of PyTorch's is taken."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from torch import nn

from oriented1d.training.errors import UserError

LayerDecayScheme = Literal["layer_wise", "stage_wise"]


def layer_id(name: str, scheme: LayerDecayScheme, num_layers: int) -> int:
    """Layer of a parameter, from 0 (the stem) to ``num_layers + 1`` (norms of the outputs and heads).

    Args:
        name: name of the parameter in ConvNeXt's layout, ``stages.2.4.norm.weight``, with or without ``backbone.``.
        scheme: ``layer_wise`` cuts the third stage into layers of three blocks; ``stage_wise`` has one layer for each
            stage, and all down-sampling layers are layer 0.
        num_layers: 6 or 12 for detection and segmentation (tiny and base), always 12 for classification.

    Source: the optimizer constructors of the original's three tasks.
    """
    part, *rest = name.removeprefix("backbone.").split(".")
    if part not in ("downsample_layers", "stages") or not rest[0].isdecimal():
        return num_layers + 1
    stage = int(rest[0])
    if scheme == "stage_wise":
        return 0 if part == "downsample_layers" else stage + 1
    if part == "downsample_layers" and stage == 0:
        return 0
    if stage < 2:
        return stage + 1
    if stage == 2:
        return 3 + (int(rest[1]) // 3 if part == "stages" else 0)
    return num_layers


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    scheme: LayerDecayScheme = "layer_wise",
    num_layers: int = 12,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for a torch optimizer.

    Biases and one-dimensional parameters get no weight decay. With ``layer_decay``, a parameter of layer ``i`` gets
    ``lr * layer_decay ** (num_layers + 1 - i)``. The scaled rate is the group's own ``lr``, because torch's schedulers
    multiply that one and know nothing of timm's ``lr_scale``.

    Returns:
        dicts with ``name`` (``decay``, ``layer_3_no_decay``, ...), ``params``, ``lr`` and ``weight_decay``.

    Raises:
        UserError: ``layer_decay`` is given and no parameter is named as in ConvNeXt-1D.
    """
    groups: dict[str, dict[str, Any]] = {}
    layers = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() > 1 and not name.endswith(".bias")
        group_name, scale = "decay" if decays else "no_decay", 1.0
        if layer_decay is not None:
            layer = layer_id(name, scheme, num_layers)
            layers.add(layer)
            group_name, scale = f"layer_{layer}_{group_name}", layer_decay ** (num_layers + 1 - layer)
        group = groups.setdefault(
            group_name,
            {"name": group_name, "params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    if layer_decay is not None and layers <= {num_layers + 1}:
        names = ", ".join([name for name, _ in model.named_parameters()][:3])
        raise UserError(
            "model.layer_decay: expected null for a network whose parameters are not named downsample_layers.* and "
            f"stages.*, as in ConvNeXt-1D; this one has {names}, ..., got {layer_decay}"
        )
    return list(groups.values())


def adamw_options(trainer: L.Trainer) -> dict[str, Any]:
    """Further arguments of AdamW: on a GPU the fused one, which launches a few kernels instead of dozens.

    Lightning cannot clip gradients that the optimizer itself unscales, as the fused one does in ``16-mixed``.
    """
    plain = trainer.gradient_clip_val or trainer.precision == "16-mixed"
    return {} if plain or trainer.strategy.root_device.type != "cuda" else {"fused": True}
