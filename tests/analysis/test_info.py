from __future__ import annotations

import pytest
import timm
import torch
from timm.models import FeatureListNet
from torch import nn

from oriented1d import OrientedConv1d
from oriented1d.analysis import info, networks
from oriented1d.analysis.flops import detector_multiply_adds, multiply_adds, run_on_meta
from oriented1d.cli import main
from oriented1d.detection import CascadeMaskRCNN
from oriented1d.models import KERNEL_SIZES
from oriented1d.segmentation import UPerNet

DEPTHS, DIMS, CLASSES, STEM = (1, 1, 2, 1), (8, 16, 24, 32), 10, 16


def small(kernels: str, **options) -> nn.Module:
    return timm.create_model(
        f"convnext_atto_{kernels}", depths=DEPTHS, dims=DIMS, stem_dim=STEM, num_classes=CLASSES, **options
    )


def test_multiply_adds_of_layers_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 x 6 x 5 outputs of 3 * 9
        OrientedConv1d(8, 7, residual=True),  # 8 x 6 x 5 outputs of 7
        OrientedConv1d(8, 5, stride=2),  # 8 x 3 x 3 outputs of 5
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(72, 11),
    )
    assert multiply_adds(model, (12, 10)) == 240 * 27 + 240 * 7 + 72 * 5 + 72 * 11
    assert multiply_adds(OrientedConv1d(3, 9), 6) == 3 * 36 * 9


@pytest.mark.parametrize("kernels", KERNEL_SIZES)
def test_multiply_adds_of_networks_by_hand(kernels: str) -> None:
    size, sizes = 64, KERNEL_SIZES[kernels]
    first = size**2 // 16  # pixels of the first stage
    if kernels.startswith("1d"):
        expected = size**2 * 3 * STEM + (size**2 // 4 + first) * STEM * sizes[0] + first * STEM * DIMS[0]
    else:
        expected = first * DIMS[0] * 3 * 16
    for i, (depth, dim) in enumerate(zip(DEPTHS, DIMS, strict=True)):
        pixels = first // 4**i
        if i:
            expected += pixels * DIMS[i - 1] * dim * 4
        per_channel = sizes[0] ** (1 if kernels.startswith("1d") else 2) + 8 * dim
        if kernels.endswith("pp"):
            per_channel += 4 * sizes[1]
        expected += depth * pixels * dim * per_channel
    expected += DIMS[-1] * CLASSES
    assert multiply_adds(small(kernels), size) == expected


def test_counting_leaves_the_network_alone() -> None:
    model = small("1dpp").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = run_on_meta(model, 32)
    assert (output.device.type, output.shape, output.requires_grad) == ("meta", (1, CLASSES), False)
    assert model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_networks_of_timm_have_their_known_cost() -> None:
    # The table of torchvision's documentation gives 4.09 and 1.81 GFLOPs.
    assert multiply_adds(timm.create_model("resnet50"), 224) == 4_089_184_256
    assert multiply_adds(timm.create_model("resnet18"), 224) == 1_814_073_344


def test_published_table() -> None:
    with torch.device("meta"):
        rows = info.comparison(info.CLASSIFICATION, networks.create, lambda model: multiply_adds(model, 224))
    assert [row["network"] for row in rows] == [
        f"convnext_{size}_{kernels}" for size in ("tiny", "base") for kernels in ("2d", "1d", "1dpp", "2dpp")
    ]
    assert [row["parameters"] for row in rows] == [row["parameters_paper"] for row in rows]
    assert rows[1]["parameters"] == 28_476_040
    assert rows[1]["gflops"] == pytest.approx(4.46248064, abs=1e-9)
    different = {row["network"] for row in rows if f"{row['gflops']:.1f}" != f"{row['gflops_paper']:.1f}"}
    assert different == {"convnext_tiny_1d", "convnext_tiny_2dpp"}
    assert all(abs(row["gflops"] - row["gflops_paper"]) < 0.08 for row in rows)  # type: ignore[operator]
    assert [row["score_paper"] for row in rows] == ["82.0", "82.2", "82.7", "82.5", "83.7", "83.8", "83.8", "84.0"]


def test_dense_tables() -> None:
    """The paper's detectors come out where their oriented layers, which its counter did not see, are left out."""
    with torch.device("meta"):
        for line in info.DETECTION[:2]:
            model = CascadeMaskRCNN(line.network).eval()
            counted = detector_multiply_adds(model, (800, 1280)) / 1e9
            oriented, height, width = 0.0, 800, 1280
            for name, layer in model.named_modules():
                if isinstance(layer, OrientedConv1d):
                    stage = 0 if "downsample" in name else int(name.split(".")[2])
                    scale = (2 if name.endswith("dw1") else 4) if "downsample" in name else 4 * 2**stage
                    oriented += layer.channels * layer.kernel_size * height * width / scale**2 / 1e9
            assert line.gflops is not None
            assert counted - oriented == pytest.approx(line.gflops, rel=0.0015), line.network
        model = UPerNet("convnext_tiny_2d").eval()
        assert info.parameters(model) == 60_242_636
        assert multiply_adds(model, (512, 2048)) / 1e9 == pytest.approx(938.5, abs=0.1)


def test_parameters_are_the_trainable_ones() -> None:
    layer = OrientedConv1d(8, 7)
    assert info.parameters(layer) == 8 * 7 + 8
    layer.weight.requires_grad_(False)
    assert info.parameters(layer) == 8


def test_feature_shapes() -> None:
    expected = {"stages.0": (8, 15, 23), "stages.1": (16, 7, 11), "stages.2": (24, 3, 5), "stages.3": (32, 1, 2)}
    model = small("1d")
    assert info.feature_shapes(model, (60, 90)) == expected
    assert not any(module._forward_hooks for module in model.modules())
    assert info.feature_shapes(small("1d", features_only=True), (60, 90)) == expected
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
    assert isinstance(backbone, FeatureListNet)
    assert info.feature_shapes(backbone, 64) == {"layer1": (64, 16, 16), "layer2": (128, 8, 8)}
    assert info.feature_shapes(nn.Conv2d(3, 4, 1), 8) == {}


def test_kernels_and_angles_by_layer() -> None:
    rows = {row.pop("layer"): row for row in info.kernel_rows(small("1dpp"))}
    assert len(rows) == 2 + 3 + 2 * sum(DEPTHS)
    assert rows["downsample_layers.0.dw2"] == {
        "kind": "oriented",
        "channels": "16",
        "kernel": "15",
        "stride": "2",
        "angles": "90 112.5 135 157.5 0 22.5 45 67.5",
    }
    assert rows["downsample_layers.1.1"] == {
        "kind": "convolution",
        "channels": "8 to 16",
        "kernel": "2x2",
        "stride": "2",
        "angles": "",
    }
    second = rows["stages.2.0.dwconv2"]
    assert (second["kind"], second["channels"], second["kernel"]) == ("oriented + identity", "96", "31")
    assert second["angles"] == "0 22.5 45 67.5 90 112.5 135 157.5"
    assert rows["stages.2.1.dwconv2"]["angles"].startswith("90 ")
    square = {row["layer"]: row for row in info.kernel_rows(small("2d"))}
    assert (square["stages.0.0.dwconv"]["kind"], square["stages.0.0.dwconv"]["kernel"]) == ("depthwise", "7x7")


def test_command_for_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "convnext_atto_1d", "--size", "64x96"]) == 0
    printed = capsys.readouterr().out
    model = timm.create_model("convnext_atto_1d")
    for text in ("3,667,648", f"{multiply_adds(model, (64, 96)) / 1e9:.3f}", "320 x 2 x 3", "stages.3.1.dwconv"):
        assert text in printed
    assert main(["info", "convnext_atto_1d", "--features"]) == 0
    without_head = 3_667_648 - 320 * 1000 - 1000 - 2 * 320
    assert f"{without_head:,}" in capsys.readouterr().out


def test_command_for_the_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--all"]) == 0
    printed = capsys.readouterr().out
    line, detector, segmenter = (line for line in printed.splitlines() if "│ convnext_base_2dpp" in line)
    assert detector.split("│")[4].strip() == "964"
    assert segmenter.split("│")[6].strip() == "50.2"
    assert line.split("│")[2:7] == [
        "        90,901,608 ",
        " 90,901,608 ",
        "          15.9 ",
        " 15.933 ",
        "           84.0 ",
    ]
    assert "round to the paper's: convnext_tiny_1d, convnext_tiny_2dpp" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convnext_atto_3d"], 1, "model: expected a network that timm knows, got 'convnext_atto_3d'"),
        (["vit_tiny_patch16_224", "--size", "32"], 1, "--size: expected a size of images that vit_tiny_patch16_224"),
        (["convnext_atto_1d", "--size", "2x3x4"], 2, "expected pixels, as in 224, or height x width"),
        (["convnext_atto_1d", "--size", "0"], 2, "expected pixels, as in 224, or height x width"),
        ([], 2, "expected the name of a network, or --all"),
        (["--all", "--size", "32"], 2, "--all: the paper's tables have sizes of their own"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    assert main(["info", *arguments]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert message in line
