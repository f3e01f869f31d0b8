"""The configurations that come with the project: they parse, build, and hold the recipe's numbers."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.auto_augment import AugmentOp

from oriented1d.analysis.study import NETWORKS
from oriented1d.classification import ImageData
from oriented1d.cli import main
from oriented1d.layers import OrientedConv1d

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "classification"
STUDY = {"study_textures": (3, 64, 2), "study_fashion_mnist": (1, 28, 1)}  # channels, size, stride of the stem
PUBLISHED = [f"convnext_{size}_{kernels}" for size in ("tiny", "base") for kernels in ("1d", "1dpp", "2d", "2dpp")]
# Trainable parameters of the published networks.
PARAMETERS = {
    "convnext_tiny_1d": 28_476_040,
    "convnext_tiny_1dpp": 29_215_880,
    "convnext_tiny_2d": 28_589_128,
    "convnext_tiny_2dpp": 29_437_000,
    "convnext_base_1d": 88_273_256,
    "convnext_base_1dpp": 90_292_584,
    "convnext_base_2d": 88_591_464,
    "convnext_base_2dpp": 90_901_608,
}


def parse(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the command makes of a configuration, defaults included."""
    assert main(["fit", "--config", str(FOLDER / f"{name}.yaml"), *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def build(part: dict[str, Any]) -> Any:
    return pydoc.locate(part["class_path"])(**part["init_args"])  # type: ignore[operator]


def test_every_configuration_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PUBLISHED, "quickstart", "speed", "textures", *STUDY}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_training(name, capsys):
    config = parse(name, capsys)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert config["trainer"]["max_epochs"] == 300
    assert config["trainer"]["accumulate_grad_batches"] == 1  # follows from the total batch size
    recipe = {
        "network": name, "num_classes": 1000, "drop_path_rate": 0.5 if "base" in name else 0.1, "optimizer": "adamw",
        "lr": 4e-3, "weight_decay": 0.05, "layer_decay": None, "warmup_epochs": 20, "final_lr": 1e-6,
        "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mix_switch_prob": 0.5, "ema_decay": 0.9999,
    }  # fmt: skip
    assert {key: model[key] for key in recipe} == recipe
    recipe = {
        "image_size": 224, "total_batch_size": 4096, "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4,
        "erasing": 0.25, "interpolation": "bicubic", "crop_pct": None, "hflip": 0.5, "scale": [0.08, 1.0],
        "mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD), "dataset": "",
    }  # fmt: skip
    assert {key: data[key] for key in recipe} == recipe
    assert 4096 % data["batch_size"] == 0

    with torch.device("meta"):
        module = build(config["model"])
    assert sum(parameter.numel() for parameter in module.model.parameters()) == PARAMETERS[name]
    assert isinstance(module.mix, Mixup)
    assert (module.mix.mixup_alpha, module.mix.cutmix_alpha, module.mix.switch_prob) == (0.8, 1.0, 0.5)
    assert module.mix.label_smoothing == 0.1


def test_defaults_are_the_recipe_so_that_configurations_stay_short():
    assert max(len(FOLDER.joinpath(f"{name}.yaml").read_text().splitlines()) for name in PUBLISHED) < 20


@pytest.mark.parametrize("name", ["quickstart", "textures"])
def test_small_training(name, capsys):
    config = parse(name, capsys)
    module, data = build(config["model"]), build(config["data"])
    assert sum(parameter.numel() for parameter in module.model.parameters()) < 3_000_000
    size = data.image_size
    assert module.eval()(torch.zeros(1, 3, size, size)).shape == (1, module.num_classes)


@pytest.mark.parametrize("name", STUDY)
def test_study(name, capsys):
    """The six networks are alike in size, and keep stages of the sizes that images of 224 have in the paper."""
    channels, size, stride = STUDY[name]
    parameters = []
    for options in NETWORKS.values():
        config = parse(name, capsys, *options)
        module = build(config["model"])
        assert module.model.feature_info[0]["reduction"] == stride
        assert module(torch.zeros(1, channels, size, size)).shape == (1, module.num_classes)
        parameters.append(sum(parameter.numel() for parameter in module.parameters()))
        assert config["trainer"]["max_epochs"] % config["trainer"]["check_val_every_n_epoch"] == 0
    assert 3_000_000 < min(parameters) < max(parameters) < 4_000_000
    assert max(parameters) / min(parameters) < 1.08
    turns = [layer.angles.angles for layer in module.modules() if isinstance(layer, OrientedConv1d)]
    assert turns == [(0.0,)] * 14  # the last of them is horizontal throughout


def test_overrides_reach_the_classes(capsys):
    config = parse(
        "convnext_tiny_1d", capsys, "--model.pretrained", "weights.pth", "--data.root", "elsewhere",
        "--model.network_args.num_directions", "2", "--trainer.num_nodes", "4",
    )  # fmt: skip
    assert config["model"]["init_args"]["pretrained"] == "weights.pth"
    assert config["model"]["init_args"]["network_args"] == {"num_directions": 2}
    assert config["data"]["init_args"]["root"] == "elsewhere"
    assert config["trainer"]["num_nodes"] == 4


def described(transform: Any) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]


def test_training_transform_is_the_recipes():
    transform = ImageData().train_transform()
    assert described(transform) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybePILToTensor",
    ]  # fmt: skip
    crop, flip, augment, _ = transform.transforms
    assert (crop.size, crop.scale, str(crop.interpolation)) == ((224, 224), (0.08, 1.0), "InterpolationMode.BICUBIC")
    assert flip.p == 0.5
    assert augment.num_layers == 2
    assert {(op.magnitude, op.magnitude_std) for op in augment.ops} == {(9, 0.5)}
    assert "PosterizeIncreasing" in {op.name for op in augment.ops}


@pytest.mark.parametrize(
    ("size", "resize", "steps"),
    [
        (224, 256, ["Resize", "CenterCrop", "MaybePILToTensor"]),
        (64, 73, ["Resize", "CenterCrop", "MaybePILToTensor"]),
        (384, (384, 384), ["Resize", "CenterCrop", "MaybePILToTensor"]),
    ],
)
def test_validation_transform(size, resize, steps):
    """224 out of 256 below 384 pixels, the whole image warped from there on."""
    transform = ImageData(image_size=size).eval_transform()
    assert described(transform) == steps
    assert transform.transforms[0].size == resize
    assert str(transform.transforms[0].interpolation) == "InterpolationMode.BICUBIC"


def test_strongest_posterize_of_the_recipe_gives_a_black_image():
    """It keeps 0 bits, which Pillow 13 refuses."""
    op = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert op(Image.new("RGB", (2, 2), (255, 200, 7))).getextrema() == ((0, 0), (0, 0), (0, 0))
    op = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=5)
    assert op(Image.new("RGB", (2, 2), (255, 200, 7))).getextrema() == ((192, 192), (192, 192), (0, 0))


def test_docstrings_name_every_option():
    for name in ("ImageClassifier", "ImageData"):
        cls = pydoc.locate(f"oriented1d.classification.{name}")
        documented = cls.__doc__.split("Args:")[1]
        for option in inspect.signature(cls).parameters:
            assert option in documented, option
