"""Checkpoint files: read the official ones and ours, tell which network they hold, load and convert them.

Files are read without running anything inside them: ``torch.load(weights_only=True)``, or safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from oriented1d.files import unfinished
from oriented1d.models.convnext import DENSE_KERNEL_SIZES, KERNEL_SIZES, SIZES, ConvNeXtFeatures


def read_checkpoint(path: str | Path, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """The state dict of the network in a file, with the keys of :class:`oriented1d.models.ConvNeXt`.

    What wrappers add to keys is removed: ``model.`` of Lightning, ``module.`` of DDP, ``_orig_mod.`` of
    ``torch.compile``, and of mmdet and mmseg ``backbone.`` (their other parts are left out) and the ``conv.`` around
    oriented layers.

    Args:
        path: the file.
        ema: take the EMA weights of the file.

    Returns:
        The state dict, on the CPU, and the kind of the file:

        - ``"safetensors"``;
        - ``"official"``: a dict with ``model``, and ``model_ema`` where there is one;
        - ``"lightning"``: a Lightning checkpoint with the network in ``model.*`` and its EMA copy in ``ema.module.*``;
        - ``"state_dict"``: a dict with ``state_dict``, from mmdet, mmseg, or :func:`convert`;
        - ``"plain"``: a state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, holds more than tensors and plain values, or has no EMA weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    content = _load(path)
    if path.suffix == ".safetensors":
        kind, found = "safetensors", None if ema else content
    elif "pytorch-lightning_version" in content:
        kind, found = "lightning", _under(content.get("state_dict", {}), "ema.module." if ema else "model.")
    elif isinstance(content.get("state_dict"), Mapping):
        kind, found = "state_dict", None if ema else content["state_dict"]
    elif isinstance(content.get("model"), Mapping):
        kind, found = "official", content.get("model_ema") if ema else content["model"]
    else:
        kind, found = "plain", None if ema else content
    if not found and ema:
        raise ValueError(
            f"{path}: holds no EMA weights beside the plain ones (expected model_ema, or ema.module.* in a Lightning "
            f"checkpoint); files named *_best_ema.pth hold them as their plain weights"
        )
    tensors = {key: value for key, value in (found or {}).items() if isinstance(value, Tensor)}
    if not found or len(tensors) < len(found):
        odd = next((key for key in found or {} if key not in tensors), None)
        what = "no weights" if odd is None else f"{odd!r}, which is not a tensor"
        raise ValueError(f"{path}: expected a checkpoint with a state dict, got a file with {what}")
    return _plain_keys(tensors), kind


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what the readers raise for a file that is something else depends on its bytes
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: refused: it holds a {refused[1]}, and loading that could run code; expected tensors and "
                f"plain values (if you trust the file, save its state dict alone)"
            ) from error
        raise ValueError(f"{path}: expected a checkpoint, got a file that cannot be read as one") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a checkpoint with a state dict, got a {type(content).__name__}")
    return content


def _under(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _plain_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state_dict.items()}
    plain = _under(plain, "backbone.") or plain
    plain = {re.sub(r"\b(dwconv[12]?|dw[12])\.conv\.", r"\1.", key): value for key, value in plain.items()}
    return {key: value.flatten() if key.endswith(".theta") else value for key, value in plain.items()}


@dataclasses.dataclass(frozen=True)
class Network:
    """What the keys and shapes of a state dict say about its network.

    Attributes:
        kernels: ``"2d"``, ``"2dpp"``, ``"1d"`` or ``"1dpp"``.
        depths, dims: blocks and channels of each stage.
        kernel_sizes: of the depthwise layers of each stage.
        num_directions: of the oriented layers; 8 where there is none.
        stem_dim: channels inside the 1D stem; 64 where there is none.
        in_chans: channels of the images.
        num_classes: of the classifier; 0 where there is none.
        layer_scale: whether the blocks have one.
    """

    kernels: str
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    num_directions: int
    stem_dim: int
    in_chans: int
    num_classes: int
    layer_scale: bool

    @property
    def name(self) -> str:
        """Name in timm of the network with these kernels, and with these depths and dims if there is one."""
        size = next((size for size, shape in SIZES.items() if shape == (self.depths, self.dims)), "tiny")
        return f"convnext_{size}_{self.kernels}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments: ``timm.create_model(network.name, **network.arguments)`` builds the network."""
        arguments = dataclasses.asdict(self)
        del arguments["kernels"]
        if not arguments.pop("layer_scale"):
            arguments["layer_scale_init_value"] = 0.0
        return arguments

    def __str__(self) -> str:
        words = [self.name]
        if (self.depths, self.dims) not in SIZES.values():
            words = [f"a {self.kernels} network of depths {list(self.depths)}", f"dims {list(self.dims)}"]
        if self.kernel_sizes != (KERNEL_SIZES[self.kernels],) * len(self.depths):
            words.append(f"kernel sizes {[list(sizes) for sizes in self.kernel_sizes]}")
        if self.num_directions != 8:
            words.append(f"{self.num_directions} directions")
        if self.stem_dim != 64:
            words.append(f"stem_dim {self.stem_dim}")
        if self.in_chans != 3:
            words.append(f"{self.in_chans} input channels")
        if not self.layer_scale:
            words.append("no layer scale")
        words.append(f"{self.num_classes} classes" if self.num_classes else "no classifier")
        return ", ".join(words)


def infer_network(state_dict: Mapping[str, Tensor]) -> Network:
    """Work out the network from the keys and shapes of its state dict, as :func:`read_checkpoint` returns it.

    Raises:
        ValueError: a key that every network has is missing, or there are not four stages.
    """

    def get(key: str) -> Tensor:
        if key not in state_dict:
            raise ValueError(f"state_dict: expected a ConvNeXt of this library, got no key {key!r}")
        return state_dict[key]

    twice = "stages.0.0.dwconv1.weight" in state_dict
    layers = ["dwconv1", "dwconv2"] if twice else ["dwconv"]
    oriented = f"stages.0.0.{layers[0]}.theta" in state_dict
    blocks = {match.groups() for key in state_dict if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    stages = sorted({stage for stage, _ in blocks})
    if stages != ["0", "1", "2", "3"]:
        raise ValueError(
            f"state_dict: expected a ConvNeXt of four stages, got the stages {', '.join(stages) or 'none'}"
        )
    stem = get("downsample_layers.0.pw1.weight" if oriented else "downsample_layers.0.0.weight")
    thetas = [value for key, value in state_dict.items() if key.endswith(".theta")]
    head = state_dict.get("head.weight")
    return Network(
        kernels=("1d" if oriented else "2d") + ("pp" if twice else ""),
        depths=tuple(sum(stage == of for of, _ in blocks) for stage in stages),
        dims=tuple(get(f"stages.{stage}.0.pwconv1.weight").shape[1] for stage in stages),
        kernel_sizes=tuple(
            tuple(get(f"stages.{stage}.0.{layer}.weight").shape[-1] for layer in layers) for stage in stages
        ),
        num_directions=max((theta.unique().numel() for theta in thetas), default=8),
        stem_dim=stem.shape[0] if oriented else 64,
        in_chans=stem.shape[1],
        num_classes=head.shape[0] if head is not None else 0,
        layer_scale="stages.0.0.gamma" in state_dict,
    )


def load_checkpoint(model: nn.Module, path: str | Path, ema: bool = False, crop: bool = False) -> list[str]:
    """Load the weights of a file (see :func:`read_checkpoint` for the kinds) into a network.

    Every key must fit. What a network does not have by design is left out: the classifier if it has no classes, and
    for ``features_only=True`` also the final norm and the stages after the last one wanted. Output norms that are not
    in the file stay as they are.

    Args:
        model: a network, or what ``features_only=True`` returns.
        path: the file.
        ema: take the EMA weights of the file.
        crop: crop oriented kernels that are larger in the file, centred: an official classification file fits the
            backbone for dense tasks. The taps that stay do not move.

    Returns:
        Lines that say what was left out, left as it was, or cropped; empty if file and network are the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, has no EMA weights, or does not fit the network.
    """
    weights, _ = read_checkpoint(path, ema)
    wanted = model.state_dict()
    file = {key: value for key, value in weights.items() if not _left_out(model, key)}
    changes = []
    if len(file) < len(weights):
        changes.append(f"left out {_some(key for key in weights if key not in file)}")
    if isinstance(model, ConvNeXtFeatures) and model.output_norms and not any(key.startswith("norm") for key in file):
        norms = {key: value for key, value in wanted.items() if key.startswith("norm")}
        file |= norms
        changes.append(f"left as they were, not in the file: {_some(norms)}")
    if crop:
        changes += _crop(file, {key: value.shape[-1] for key, value in wanted.items() if _is_oriented(key, value)})
    _check_fit(wanted, file, weights, path)
    model.load_state_dict(file)
    return changes


def load_dense_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load a file into a network for a dense task, which has its backbone in ``backbone``.

    A file with heads (of ours, of mmdet or mmseg) must fit the whole network; any other file (see
    :func:`read_checkpoint`) is loaded into the backbone alone, its oriented kernels cropped where they are larger.

    Returns:
        Lines that say what was left out, left as it was, or cropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or does not fit.
    """
    path = Path(path)
    heads = {name for name, _ in model.named_children()} - {"backbone"}
    if path.is_file():
        content = _load(path)
        state_dict = content.get("state_dict", content)
        if "pytorch-lightning_version" in content:
            state_dict = _under(state_dict, "model.")
        if isinstance(state_dict, Mapping) and any(key.split(".")[0] in heads for key in state_dict):
            whole = {f"backbone.{key}": value for key, value in _plain_keys(dict(state_dict)).items()}
            whole |= {key: value for key, value in state_dict.items() if not key.startswith("backbone.")}
            _check_fit(model.state_dict(), whole, whole, path)
            model.load_state_dict(whole)
            return []
    return load_checkpoint(model.get_submodule("backbone"), path, crop=True)


def convert(checkpoint: str | Path, output: str | Path, to: str = "backbone", ema: bool = False) -> list[str]:
    """Write the network of a checkpoint in another form.

    Args:
        checkpoint: the file to read; :func:`read_checkpoint` lists the kinds.
        output: the file to write.
        to: ``"backbone"`` writes a ``torch.save`` dict with ``state_dict``, made for dense tasks: oriented kernels are
            cropped, centred, to :data:`oriented1d.models.DENSE_KERNEL_SIZES`, and classifier and final norm are left
            out. ``"safetensors"`` writes the whole network as it is.
        ema: take the EMA weights of the file.

    Returns:
        Lines that say what was read, changed and written.

    Raises:
        FileNotFoundError: there is no such file, or no folder to write to.
        ValueError: ``to`` is something else, or the file is no checkpoint of a network of this library.

    Source: the table of kernel sizes is that of the original's configs for detection and segmentation.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if to not in ("backbone", "safetensors"):
        raise ValueError(f"to: expected 'backbone' or 'safetensors', got {to!r}")
    if to == "safetensors" and output.suffix != ".safetensors":
        raise ValueError(f"{output}: expected a name that ends in .safetensors")
    if to == "backbone" and output.suffix == ".safetensors":
        raise ValueError(f"{output}: expected a name such as backbone.pth; a backbone is not written as safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder to write {output.name} to")
    weights, kind = read_checkpoint(checkpoint, ema)
    try:
        network = infer_network(weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    changes = [f"read {checkpoint} ({kind}{', EMA weights' if ema else ''}): {network}"]
    if to == "backbone":
        left_out = [key for key in weights if key.startswith(("head.", "norm."))]
        if left_out:
            changes.append(f"left out {_some(left_out)}")
        weights = {key: value for key, value in weights.items() if key not in left_out}
        sizes = {}
        for key in weights:
            place = re.fullmatch(r"stages\.(\d)\.\d+\.dwconv([12]?)\.weight", key)
            if place:
                sizes[key] = DENSE_KERNEL_SIZES[network.kernels][int(place[1])][-1 if place[2] == "2" else 0]
        changes += _crop(weights, sizes)
        with unfinished(output) as path:
            torch.save({"state_dict": weights}, path)
    else:
        whole = {key: value.contiguous() for key, value in weights.items()}
        # save_file() makes files that only their owner can read
        with unfinished(output) as path:
            path.write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))
    return [*changes, f"wrote {output}: {len(weights)} tensors, {network.name}"]


def _is_oriented(key: str, value: Tensor) -> bool:
    return key.endswith(".weight") and value.dim() == 4 and value.shape[1:3] == (1, 1)


def _left_out(model: nn.Module, key: str) -> bool:
    """Whether the network lacks this weight by design."""
    if not isinstance(model, ConvNeXtFeatures):
        return key.startswith("head.") and getattr(model, "num_classes", None) == 0
    if match := re.match(r"(?:stages|downsample_layers)\.(\d+)\.", key):
        return int(match[1]) >= len(model.stages)
    if match := re.match(r"norm(\d)\.", key):
        return model.output_norms and int(match[1]) not in model.out_indices
    return key.startswith(("head.", "norm."))


def _crop(state_dict: dict[str, Tensor], sizes: Mapping[str, int]) -> list[str]:
    """Crop oriented kernels to ``sizes`` where they are larger. Tap ``t`` is at index ``t + (K - 1) / 2``."""
    cropped: dict[tuple[int, int], list[str]] = {}
    for key, size in sizes.items():
        if key in state_dict and _is_oriented(key, state_dict[key]) and state_dict[key].shape[-1] > size:
            before = state_dict[key].shape[-1]
            margin = (before - size) // 2
            state_dict[key] = state_dict[key][..., margin : margin + size].contiguous()
            cropped.setdefault((before, size), []).append(key)
    return [f"cropped from {before} to {size} taps: {_some(keys)}" for (before, size), keys in cropped.items()]


def _check_fit(
    wanted: Mapping[str, Tensor], file: Mapping[str, Tensor], whole_file: Mapping[str, Tensor], path: str | Path
) -> None:
    missing = [key for key in wanted if key not in file]
    unknown = [key for key in file if key not in wanted]
    reshaped = [key for key in wanted if key in file and wanted[key].shape != file[key].shape]
    if not missing and not unknown and not reshaped:
        return
    parts = []
    if missing:
        parts.append(f"not in the file: {_some(missing)}")
    if unknown:
        parts.append(f"not in the network: {_some(unknown)}")
    if reshaped:
        shapes = [f"{key} {tuple(file[key].shape)} instead of {tuple(wanted[key].shape)}" for key in reshaped]
        parts.append(f"of another shape: {_some(shapes)}")
    if not missing and not unknown and set(reshaped) == {"head.weight", "head.bias"}:
        classes, wanted_classes = len(file["head.bias"]), len(wanted["head.bias"])
        parts.append(f"create the network with num_classes={classes}, load, then reset_classifier({wanted_classes})")
    larger = [key for key in reshaped if _is_oriented(key, wanted[key]) and file[key].shape[-1] > wanted[key].shape[-1]]
    if not missing and not unknown and larger == reshaped:
        parts.append("crop=True crops oriented kernels that are larger in the file")
    if unknown and all(re.match(r"norm\d\.", key) for key in unknown):
        parts.append("output_norms=True gives the network these norms")
    names = []
    for state_dict in (whole_file, wanted):
        try:
            names.append(str(infer_network(state_dict)))
        except ValueError:
            names.append("no ConvNeXt of this library")
    raise ValueError(f"{path}: looks like {names[0]}; the network is {names[1]}; {'; '.join(parts)}")


def _some(items: Iterable[str], shown: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
