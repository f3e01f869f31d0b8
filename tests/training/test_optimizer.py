"""Parameter groups: the original's, name by name, and what they do to an optimizer step."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import oriented1d  # noqa: F401
from oriented1d.classification import ImageClassifier
from oriented1d.detection import ObjectDetector
from oriented1d.segmentation import SemanticSegmenter
from oriented1d.training.errors import UserError
from oriented1d.training.optimizer import LayerDecayScheme, adamw_options, layer_id, parameter_groups
from oriented1d.training.schedule import warmup_cosine_scheduler

CASES = [
    "detection_tiny_1d",
    "segmentation_tiny_1d",
    "detection_base_1d",
    "segmentation_base_1d",
    "detection_tiny_1dpp",
    "segmentation_tiny_1dpp",
    "detection_base_1dpp",
    "segmentation_base_1dpp",
    "classification_convnext_base_1d_layer_decay_0.8",
    "classification_convnext_tiny_1d_layer_decay_0.8",
    "classification_convnext_base_2d_layer_decay_0.8",
]


def module_of(shapes: dict[str, list[int]]) -> nn.Module:
    """A module that has these parameters, without memory."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


@pytest.fixture(scope="module")
def golden_cases(goldens: Path) -> dict[str, dict]:
    return {case["name"]: case for case in json.loads((goldens / "layer_decay.json").read_text())["cases"]}


def test_all_cases_are_listed(golden_cases):
    assert sorted(golden_cases) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_groups_equal_the_originals(golden_cases, name):
    case = golden_cases[name]
    scheme: LayerDecayScheme = "stage_wise" if case.get("decay_type") == "stage_wise" else "layer_wise"
    decay = case["layer_decay"] if "layer_decay" in case else case["decay_rate"]
    model = module_of({key: value["shape"] for key, value in case["parameters"].items()})
    groups = parameter_groups(model, 3e-4, 0.05, layer_decay=decay, scheme=scheme, num_layers=case["num_layers"])

    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(case["parameters"])
    for key, parameter in model.named_parameters():
        group, expected = found[id(parameter)], case["parameters"][key]
        assert group["name"] == expected["group"], key
        assert group["lr"] == 3e-4 * expected["lr_scale"], key
        assert group["weight_decay"] == expected["weight_decay"], key


def test_our_networks_are_named_as_in_the_goldens(golden_cases):
    case = golden_cases["classification_convnext_tiny_1d_layer_decay_0.8"]
    with torch.device("meta"):
        model = timm.create_model("convnext_tiny_1d")
    expected = {key for key in case["parameters"] if not key.endswith(".theta")}
    assert {key for key, _ in model.named_parameters()} == expected


@pytest.mark.parametrize(
    ("name", "scheme", "num_layers", "expected"),
    [
        ("downsample_layers.0.pw1.weight", "layer_wise", 12, 0),
        ("downsample_layers.1.0.weight", "layer_wise", 12, 2),
        ("backbone.downsample_layers.2.1.weight", "layer_wise", 12, 3),
        ("downsample_layers.3.1.weight", "layer_wise", 6, 6),
        ("backbone.stages.0.2.gamma", "layer_wise", 6, 1),
        ("stages.1.2.dwconv.conv.weight", "layer_wise", 6, 2),
        ("stages.2.2.gamma", "layer_wise", 12, 3),
        ("stages.2.26.gamma", "layer_wise", 12, 11),
        ("stages.3.0.gamma", "layer_wise", 12, 12),
        ("head.weight", "layer_wise", 12, 13),
        ("backbone.norm2.weight", "layer_wise", 6, 7),
        ("backbone.downsample_layers.3.1.weight", "stage_wise", 6, 0),
        ("backbone.stages.3.0.gamma", "stage_wise", 6, 4),
        ("decode_head.conv_seg.weight", "stage_wise", 6, 7),
    ],
)
def test_layer_id(name, scheme, num_layers, expected):
    assert layer_id(name, scheme, num_layers) == expected


class Small(nn.Module):
    """Three parameters in layers 0, 3 and 13."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Linear(2, 2)])
        self.stages = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(3))
        self.head = nn.Linear(2, 2)


def test_scales_and_schedule_reach_the_applied_update():
    """With gradients of one, plain SGD moves each parameter by its learning rate."""
    model = Small()
    groups = parameter_groups(model, 0.5, 0.0, layer_decay=0.8)
    optimizer = create_optimizer_v2(groups, "momentum", lr=0.5, momentum=0.0)
    scheduler = warmup_cosine_scheduler(optimizer, total_steps=4, warmup_steps=2, lr=0.5, final_lr=0.1)
    layers = {"downsample_layers.0": 0, "stages.0.0": 1, "stages.1.0": 2, "stages.2.0": 3, "head": 13}
    for rate in (0.0, 0.5, 0.5, 0.3):  # warm-up 0, 0.5; cosine 0.5, then half-way between 0.5 and 0.1
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            layer = layers[name.rpartition(".")[0]]
            moved = (before[name] - parameter.detach()).double()
            expected = torch.full_like(moved, rate * 0.8 ** (13 - layer))
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)


def test_weight_decay_reaches_matrices_only():
    """With gradients of zero, AdamW shrinks a parameter by lr * weight_decay and nothing else."""
    model = Small()
    optimizer = create_optimizer_v2(parameter_groups(model, 0.1, 0.5), "adamw", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.endswith("bias") else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0.0)


def test_frozen_parameters_are_left_out():
    model = Small()
    model.head.requires_grad_(False)
    names = {id(parameter) for group in parameter_groups(model, 0.1, 0.0) for parameter in group["params"]}
    assert names == {id(parameter) for parameter in [*model.downsample_layers.parameters(), *model.stages.parameters()]}


def test_layer_decay_of_a_network_with_other_names_is_refused():
    message = (
        r"model\.layer_decay: expected null for .* stages\.\*, .*; this one has 0\.weight, 0\.bias, \.\.\., got 0\.8"
    )
    with pytest.raises(UserError, match=message):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.1, 0.0, layer_decay=0.8)


def trainer_on(device: str, precision: str = "32-true", clip: float | None = None) -> mock.Mock:
    """What the tasks ask of a trainer."""
    strategy = mock.Mock(root_device=torch.device(device))
    return mock.Mock(
        strategy=strategy,
        precision=precision,
        gradient_clip_val=clip,
        num_training_batches=4,
        accumulate_grad_batches=1,
        estimated_stepping_batches=8,
    )


@pytest.mark.parametrize(
    ("device", "precision", "clip", "fused"),
    [
        ("cuda:1", "32-true", None, True),
        ("cuda", "bf16-mixed", None, True),
        ("cuda", "bf16-mixed", 0.0, True),
        ("cuda", "bf16-mixed", 1.0, False),
        ("cuda", "16-mixed", None, False),
        ("cpu", "32-true", None, False),
        ("cpu", "bf16-mixed", 1.0, False),
    ],
)
def test_which_adamw(device, precision, clip, fused):
    assert adamw_options(trainer_on(device, precision, clip)) == ({"fused": True} if fused else {})


def test_a_trainer_has_what_the_choice_asks_for(monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0)
    assert adamw_options(trainer) == {}
    monkeypatch.setattr(trainer.strategy, "_root_device", torch.device("cuda"))
    assert adamw_options(trainer) == {}
    trainer.gradient_clip_val = None
    assert adamw_options(trainer) == {"fused": True}


@pytest.mark.parametrize("task", [ImageClassifier, ObjectDetector, SemanticSegmenter])
def test_every_task_asks_for_it(task, monkeypatch):
    small = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "stem_dim": 8}
    module = task("convnext_atto_1d", small, num_classes=3)
    for trainer, fused in ((trainer_on("cuda"), True), (trainer_on("cuda", clip=1.0), None), (trainer_on("cpu"), None)):
        monkeypatch.setattr(task, "trainer", trainer)
        assert module.configure_optimizers()["optimizer"].defaults["fused"] is fused


def test_other_optimizers_are_not_asked_to_be_fused(monkeypatch):
    small = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "stem_dim": 8}
    module = ImageClassifier("convnext_atto_1d", small, num_classes=3, optimizer="momentum")
    monkeypatch.setattr(ImageClassifier, "trainer", trainer_on("cuda"))
    assert not module.configure_optimizers()["optimizer"].defaults.get("fused")
