import argparse
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from oriented1d import oriented_conv1d
from oriented1d.models import (
    DENSE_KERNEL_SIZES,
    ConvNeXtFeatures,
    convert,
    infer_network,
    load_checkpoint,
    read_checkpoint,
)
from tests.operator.reference import relative_error

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "stem_dim": 8, "num_classes": 10}
KINDS = ["2d", "1d", "1dpp", "2dpp"]


def small(kernels: str = "1d", **keywords) -> nn.Module:
    return timm.create_model(f"convnext_tiny_{kernels}", **{**SMALL, "layer_scale_init_value": 0.5, **keywords})


def backbone(kernels: str = "1d", **keywords) -> ConvNeXtFeatures:
    keywords = {"features_only": True, "output_norms": True, "kernel_sizes": DENSE_KERNEL_SIZES[kernels], **keywords}
    return small(kernels, **keywords)


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the model with every weight random; angles stay."""
    state_dict = model.state_dict()
    return {key: v.clone() if key.endswith("theta") else torch.rand_like(v) - 0.3 for key, v in state_dict.items()}


def nan(model: nn.Module) -> nn.Module:
    """Every weight NaN: what a load does not write is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# Kinds of files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KINDS)
def test_official_classification_file(tmp_path: Path, kernels: str) -> None:
    plain, ema = random_weights(small(kernels)), random_weights(small(kernels))
    content = {
        "model": plain,
        "model_ema": ema,
        "optimizer": {"state": {}, "param_groups": [{"lr": 4e-3}]},
        "epoch": 299,
        "args": argparse.Namespace(model="convnext_tiny_1d", drop_path=0.1, data_path=None),
    }
    path = save(tmp_path / "convnext.pth", content)
    model = nan(small(kernels))
    assert load_checkpoint(model, path) == []
    assert same(model, plain)
    assert load_checkpoint(model, path, ema=True) == []
    assert same(model, ema)
    assert read_checkpoint(path)[1] == "official"


def test_official_file_without_ema(tmp_path: Path) -> None:
    path = save(tmp_path / "convnext_best_ema.pth", {"model": random_weights(small())})
    with pytest.raises(ValueError, match=r"convnext_best_ema\.pth: holds no EMA weights .*_best_ema\.pth hold them as"):
        load_checkpoint(small(), path, ema=True)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_plain_state_dict_with_the_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    weights = random_weights(small())
    path = save(tmp_path / "plain.pth", {prefix + key: value for key, value in weights.items()})
    model = nan(small())
    load_checkpoint(model, path)
    assert same(model, weights)
    assert read_checkpoint(path)[1] == "plain"


def test_angles_as_a_column_and_wrapped_layers(tmp_path: Path) -> None:
    model = small("1dpp")
    weights = random_weights(model)
    for key in weights:
        if key.endswith("theta"):
            weights[key] = weights[key] + 0.4
    content = {}
    for key, value in weights.items():
        wrapped = re.sub(r"(dwconv1|dwconv2|dw1|dw2)\.", r"\1.conv.", key)
        content["backbone." + wrapped] = value[:, None] if key.endswith("theta") else value
    assert sum(".conv." in key for key in content) == 3 * (2 + 2 * 5)
    content["decode_head.conv_seg.weight"] = torch.ones(3)
    path = save(tmp_path / "mmseg.pth", {"meta": {"epoch": 12}, "state_dict": content})
    load_checkpoint(nan(model), path)
    assert same(model, weights)
    assert read_checkpoint(path)[1] == "state_dict"
    stem = model.downsample_layers[0].dw1
    assert stem.angles.angles[0] == pytest.approx(0.4)
    x = torch.randn(1, 8, 16, 16)
    expected = oriented_conv1d(x, stem.weight, weights["downsample_layers.0.dw1.theta"], stem.bias, stride=2)
    assert torch.equal(stem(x), expected)


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
def test_lightning_checkpoint_of_ours(tmp_path: Path, compiled: str) -> None:
    plain, ema = random_weights(small()), random_weights(small())
    content = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 3,
        "callbacks": {},
        "hyper_parameters": {"model": "convnext_tiny_1d"},
        "state_dict": {f"model.{compiled}{key}": value for key, value in plain.items()}
        | {f"ema.module.{compiled}{key}": value for key, value in ema.items()}
        | {"criterion.weight": torch.ones(10)},
    }
    path = save(tmp_path / "last.ckpt", content)
    model = nan(small())
    load_checkpoint(model, path)
    assert same(model, plain)
    load_checkpoint(model, path, ema=True)
    assert same(model, ema)
    assert read_checkpoint(path)[1] == "lightning"


def test_lightning_checkpoint_of_a_detector(tmp_path: Path) -> None:
    weights = random_weights(backbone())
    state_dict = {f"model.backbone.{key}": value for key, value in weights.items()} | {"model.neck.w": torch.ones(1)}
    path = save(tmp_path / "last.ckpt", {"pytorch-lightning_version": "2.6.6", "state_dict": state_dict})
    model = nan(backbone())
    assert load_checkpoint(model, path) == []
    assert same(model, weights)


def test_safetensors(tmp_path: Path) -> None:
    weights = random_weights(small())
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights, path)
    model = nan(small())
    load_checkpoint(model, path)
    assert same(model, weights)
    assert read_checkpoint(path)[1] == "safetensors"
    with pytest.raises(ValueError, match=r"model\.safetensors: holds no EMA weights"):
        load_checkpoint(model, path, ema=True)


@pytest.mark.parametrize("case", ["cls_2d", "cls_1d", "cls_1dpp"])
def test_weights_of_the_original_reach_its_outputs(goldens: Path, tmp_path: Path, case: str) -> None:
    golden = torch.load(goldens / "networks.pt", weights_only=True)[case]
    path = save(tmp_path / "original.pth", {"model": golden["model"], "args": argparse.Namespace()})
    network = infer_network(read_checkpoint(path)[0])
    model = timm.create_model(network.name, **network.arguments)
    load_checkpoint(nan(model), path)
    assert relative_error(model(golden["x"]), golden["logits"]) < 1e-5


# Files that are refused ----------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    victim = tmp_path / "victim"
    path = tmp_path / "harmful.pth"
    content = {"model": random_weights(small()), "args": Harmful(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"harmful\.pth: refused: it holds a (posix|os)\.mkdir"):
        load_checkpoint(small(), path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert victim.exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04 no zip", random.Random(0).randbytes(64), b"accuracy,0.5\n"]
)
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected a checkpoint|{name}: refused") as caught:
        load_checkpoint(small(), path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.pth", {"model": random_weights(small())})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pth: expected a checkpoint, got a file that cannot be read as one"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
        ({}, "no weights"),
        ({"model": {}}, "no weights"),
        ({"pytorch-lightning_version": "2.6.6", "state_dict": {"net.weight": torch.ones(1)}}, "no weights"),
        ({"epoch": 3, "lr": 0.1}, "'epoch', which is not a tensor"),
        ({"model": {"head.weight": torch.ones(1), "step": 2}}, "'step', which is not a tensor"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object, what: str) -> None:
    path = save(tmp_path / "file.pth", content)
    with pytest.raises(ValueError, match=rf"file\.pth: expected a checkpoint with a state dict, got a .*{what}"):
        read_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such checkpoint file"):
            load_checkpoint(small(), str(path))


# Networks that do not fit --------------------------------------------------------------------------------------------


def error_of(model: nn.Module, path: Path, **keywords) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_checkpoint(model, path, **keywords)
    assert same(model, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_variant(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pth", {"model": random_weights(timm.create_model("convnext_atto_1d"))})
    message = error_of(timm.create_model("convnext_atto_1dpp"), path)
    assert "looks like convnext_atto_1d, 1000 classes; the network is convnext_atto_1dpp, 1000 classes" in message
    # 12 blocks have two layers of three tensors for one
    assert (
        "not in the file: stages.0.0.dwconv1.weight, stages.0.0.dwconv1.bias, stages.0.0.dwconv1.theta and 69"
        in message
    )
    assert (
        "not in the network: stages.0.0.dwconv.weight, stages.0.0.dwconv.bias, stages.0.0.dwconv.theta and 33"
        in message
    )
    assert "downsample_layers.0.dw1.weight (64, 1, 1, 31) instead of (64, 1, 1, 15)" in message


def test_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pth", {"model": random_weights(timm.create_model("convnext_nano_2d"))})
    message = error_of(timm.create_model("convnext_atto_2d"), path)
    assert "looks like convnext_nano_2d" in message
    assert "the network is convnext_atto_2d" in message
    assert "downsample_layers.0.0.weight (80, 3, 4, 4) instead of (40, 3, 4, 4)" in message


def test_another_number_of_classes(tmp_path: Path) -> None:
    weights = random_weights(small(num_classes=7))
    path = save(tmp_path / "file.pth", {"model": weights})
    message = error_of(small(), path)
    assert "7 classes; the network is" in message
    assert "create the network with num_classes=7, load, then reset_classifier(10)" in message
    model = small(num_classes=7)
    load_checkpoint(model, path)
    model.reset_classifier(10)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    headless = nan(small(num_classes=0))
    assert load_checkpoint(headless, path) == ["left out head.weight, head.bias"]
    assert same(headless, {key: value for key, value in weights.items() if not key.startswith("head")})


def test_another_model_altogether(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pth", nn.Linear(3, 4).state_dict())
    message = error_of(small(), path)
    assert "looks like no ConvNeXt of this library" in message
    assert "not in the network: weight, bias" in message


def test_a_backbone_is_no_classifier(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pth", {"state_dict": random_weights(backbone("2d"))})
    message = error_of(small("2d"), path)
    assert "not in the file: norm.weight, norm.bias, head.weight and 1 more" in message
    message = error_of(backbone("2d", output_norms=False), path)
    assert "output_norms=True gives the network these norms" in message


# What a file tells ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KINDS)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_classes": 0, "in_chans": 1, "num_directions": 4},
        {"kernel_sizes": DENSE_KERNEL_SIZES, "layer_scale_init_value": 0.0},
    ],
)
def test_network_is_inferred(kernels: str, keywords: dict) -> None:
    if "kernel_sizes" in keywords:
        keywords = {**keywords, "kernel_sizes": keywords["kernel_sizes"][kernels]}
    model = small(kernels, **keywords)
    network = infer_network(model.state_dict())
    assert network.kernels == kernels
    assert network.depths == SMALL["depths"]
    assert network.dims == SMALL["dims"]
    assert network.num_classes == keywords.get("num_classes", 10)
    assert network.in_chans == keywords.get("in_chans", 3)
    assert network.num_directions == (8 if kernels == "2d" else keywords.get("num_directions", 8))
    again = timm.create_model(network.name, **network.arguments)
    shapes = {key: value.shape for key, value in again.state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}
    thetas = [key for key in shapes if key.endswith("theta")]
    assert all(torch.equal(again.state_dict()[key], model.state_dict()[key]) for key in thetas)


@pytest.mark.parametrize("name", ["convnext_atto_1d", "convnext_small_2dpp", "convnext_large_1dpp"])
def test_name_is_inferred(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    network = infer_network(model.state_dict())
    assert network.name == name
    assert str(network) == f"{name}, 1000 classes"


@pytest.mark.parametrize("key", ["stages.1.0.pwconv1.weight", "downsample_layers.0.pw1.weight"])
def test_inference_names_what_is_missing(key: str) -> None:
    weights = small().state_dict()
    del weights[key]
    with pytest.raises(ValueError, match=f"got no key '{key}'"):
        infer_network(weights)


def test_inference_of_something_else() -> None:
    with pytest.raises(ValueError, match="expected a ConvNeXt of four stages, got the stages none"):
        infer_network({"weight": torch.ones(3)})


# Backbones and conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KINDS)
def test_classification_file_into_the_backbone_for_dense_tasks(tmp_path: Path, kernels: str) -> None:
    """Directly (cropped on the fly) and through ``convert``: the same network, whose taps have not moved."""
    model = small(kernels)
    weights = random_weights(model)
    model.load_state_dict(weights)
    path = save(tmp_path / "official.pth", {"model": weights, "args": argparse.Namespace()})
    lines = convert(path, tmp_path / "backbone.pth")
    direct, converted = nan(backbone(kernels)), nan(backbone(kernels))
    changes = load_checkpoint(direct, path, crop=True)
    assert load_checkpoint(converted, tmp_path / "backbone.pth") == [changes[1]]
    assert changes[0] == "left out norm.weight, norm.bias, head.weight and 1 more"
    assert changes[1] == "left as they were, not in the file: norm0.weight, norm0.bias, norm1.weight and 5 more"
    for i in range(4):
        for network in (direct, converted):
            nn.init.ones_(network.get_submodule(f"norm{i}").weight)
            nn.init.zeros_(network.get_submodule(f"norm{i}").bias)
    assert same(direct, converted.state_dict())

    crops = {"2d": 0, "1d": 2, "2dpp": 2, "1dpp": 3}[kernels]
    assert sum("cropped" in line for line in lines) == sum("cropped" in line for line in changes) == crops

    # The backbone computes what the classification network does with its outer taps set to zero.
    for stage, sizes in zip(model.stages, DENSE_KERNEL_SIZES[kernels], strict=True):
        for block in stage:
            layers = [block.dwconv1, block.dwconv2] if kernels.endswith("pp") else [block.dwconv]
            for layer, size in zip(layers, sizes, strict=True):
                taps = layer.weight.shape[-1]
                margin = (taps - size) // 2
                with torch.no_grad():
                    layer.weight[..., :margin] = 0
                    layer.weight[..., taps - margin :] = 0
    x = torch.randn(1, 3, 64, 96)
    expected = model.forward_intermediates(x, intermediates_only=True)
    plain = nan(backbone(kernels, output_norms=False))
    load_checkpoint(plain, tmp_path / "backbone.pth")
    for feature, zeroed in zip(plain(x), expected, strict=True):
        assert relative_error(feature, zeroed) < 1e-5


def test_cropped_kernels_keep_their_taps(tmp_path: Path) -> None:
    weights = random_weights(small("1dpp"))
    convert(save(tmp_path / "official.pth", {"model": weights}), tmp_path / "backbone.pth")
    cropped = torch.load(tmp_path / "backbone.pth", weights_only=True)["state_dict"]
    sizes = {}
    for key, weight in cropped.items():
        if weight.dim() != 4 or weight.shape[2] != 1:
            assert torch.equal(weight, weights[key])
            continue
        sizes[key] = weight.shape[-1]
        theta = cropped[key.replace("weight", "theta")]
        margin = (weights[key].shape[-1] - weight.shape[-1]) // 2
        x = torch.randn(1, len(weight), 40, 40)
        padded = nn.functional.pad(weight, (margin, margin))
        assert torch.equal(
            padded[..., margin : margin + weight.shape[-1]], weights[key][..., margin : margin + weight.shape[-1]]
        )
        assert relative_error(oriented_conv1d(x, weight, theta), oriented_conv1d(x, padded, theta)) < 1e-6
    assert sizes["downsample_layers.0.dw1.weight"] == sizes["stages.0.0.dwconv1.weight"] == 15
    assert [sizes[f"stages.{i}.0.dwconv1.weight"] for i in range(4)] == [15, 15, 15, 13]
    assert [sizes[f"stages.{i}.0.dwconv2.weight"] for i in range(4)] == [31, 31, 27, 13]


def test_without_crop_larger_kernels_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "official.pth", {"model": random_weights(small())})
    message = error_of(backbone(), path)
    assert "stages.2.0.dwconv.weight (24, 1, 1, 31) instead of (24, 1, 1, 27)" in message
    assert "crop=True crops oriented kernels" in message


def test_crop_never_widens(tmp_path: Path) -> None:
    path = save(tmp_path / "official.pth", {"model": random_weights(small(kernel_sizes=[[7]] * 4))})
    message = error_of(small(), path, crop=True)
    assert "(8, 1, 1, 7) instead of (8, 1, 1, 31)" in message
    assert "crop=True" not in message


def test_pruned_backbone_takes_what_it_has(tmp_path: Path) -> None:
    weights = random_weights(backbone())
    path = save(tmp_path / "backbone.pth", {"state_dict": weights})
    model = nan(backbone(out_indices=(0, 2)))
    load_checkpoint(model, path)
    kept = ("downsample_layers.0", "downsample_layers.1", "downsample_layers.2", "stages.0", "stages.1", "stages.2")
    assert same(model, {k: v for k, v in weights.items() if k.startswith((*kept, "norm0", "norm2"))})


def test_convert_says_what_it_does(tmp_path: Path) -> None:
    with torch.device("meta"):
        tiny = timm.create_model("convnext_tiny_1d")
    tiny.to_empty(device="cpu")
    path = save(tmp_path / "official.pth", {"model": tiny.state_dict()})
    output = tmp_path / "backbone.pth"
    assert convert(path, output) == [
        f"read {path} (official): convnext_tiny_1d, 1000 classes",
        "left out norm.weight, norm.bias, head.weight and 1 more",
        "cropped from 31 to 27 taps: stages.2.0.dwconv.weight, stages.2.1.dwconv.weight, "
        "stages.2.2.dwconv.weight and 6 more",
        "cropped from 31 to 13 taps: stages.3.0.dwconv.weight, stages.3.1.dwconv.weight, stages.3.2.dwconv.weight",
        f"wrote {output}: 208 tensors, convnext_tiny_1d",
    ]
    again = convert(output, tmp_path / "again.pth")
    assert len(again) == 2
    assert "kernel sizes [[31], [31], [27], [13]], no classifier" in again[0]


def test_convert_of_a_dense_task_file_keeps_its_norms(tmp_path: Path) -> None:
    weights = random_weights(backbone("2dpp"))
    content = {"backbone." + key.replace("dwconv2.", "dwconv2.conv."): value for key, value in weights.items()}
    path = save(tmp_path / "mmdet.pth", {"meta": {}, "state_dict": content | {"neck.conv.weight": torch.ones(1)}})
    convert(path, tmp_path / "backbone.pth")
    model = nan(backbone("2dpp"))
    assert load_checkpoint(model, tmp_path / "backbone.pth") == []
    assert same(model, weights)


@pytest.mark.parametrize("ema", [False, True])
def test_convert_to_safetensors(tmp_path: Path, ema: bool) -> None:
    plain, averaged = random_weights(small("1dpp")), random_weights(small("1dpp"))
    path = save(tmp_path / "official.pth", {"model": plain, "model_ema": averaged})
    lines = convert(path, tmp_path / "model.safetensors", to="safetensors", ema=ema)
    assert len(lines) == 2
    model = nan(small("1dpp"))
    assert load_checkpoint(model, tmp_path / "model.safetensors") == []
    assert same(model, averaged if ema else plain)


def test_convert_refuses(tmp_path: Path) -> None:
    path = save(tmp_path / "official.pth", {"model": random_weights(small())})
    with pytest.raises(ValueError, match="to: expected 'backbone' or 'safetensors', got 'onnx'"):
        convert(path, tmp_path / "out.onnx", to="onnx")
    with pytest.raises(ValueError, match=r"out\.pth: expected a name that ends in \.safetensors"):
        convert(path, tmp_path / "out.pth", to="safetensors")
    with pytest.raises(ValueError, match=r"out\.safetensors: expected a name such as backbone\.pth"):
        convert(path, tmp_path / "out.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such folder to write out\.pth to"):
        convert(path, tmp_path / "absent" / "out.pth")
    other = save(tmp_path / "other.pth", nn.Linear(3, 4).state_dict())
    with pytest.raises(ValueError, match=r"other\.pth: state_dict: expected a ConvNeXt"):
        convert(other, tmp_path / "out.pth")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["official.pth", "other.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "official.pth", {"model": random_weights(small())})
    output = tmp_path / "backbone.pth"
    output.write_bytes(b"old")

    def fail(content: object, file: Path) -> None:
        Path(file).write_bytes(pickle.dumps("half"))
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(path, output)
    assert output.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.pth", "official.pth"]
