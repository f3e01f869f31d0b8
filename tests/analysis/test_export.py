import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import oriented1d
from oriented1d import OrientedConv1d, oriented_conv1d
from oriented1d.analysis import export
from oriented1d.training.errors import UserError

onnx = pytest.importorskip("onnx", reason="needs the extra oriented1d[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra oriented1d[export]")

SMALL = {"depths": (1, 2, 1, 1), "dims": (16, 32, 48, 64), "num_classes": 10}
PACKAGE = str(Path(oriented1d.__file__).parent).encode()
ANGLES = [math.pi * n / 8 for n in range(8)]


def small(kernels: str, **keywords) -> nn.Module:
    """A small network whose blocks matter, and whose logits are of order 1."""
    stem = {"stem_dim": 16} if kernels.startswith("1d") else {}
    model = timm.create_model(
        f"convnext_tiny_{kernels}", **{**SMALL, **stem, "layer_scale_init_value": 0.5, **keywords}
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, OrientedConv1d | nn.Linear):
                module.weight.mul_(5)
                module.bias.normal_()
    return model.eval()


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]


class Layers(nn.Module):
    """Oriented layers side by side on one input; a list of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            OrientedConv1d(16, kernel_size, stride, angles=sorted(ANGLES * 2), residual=residual, bias=bias)
            for kernel_size in (1, 7, 31)
            for stride in (1, 2)
            for residual, bias in ((False, True), (True, False))
        )
        self.spread = nn.Conv2d(3, 16, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.spread(images)
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 7, 31])
def test_boxes_are_the_operator(kernel_size: int, stride: int, residual: bool) -> None:
    # 31 taps are wider than the image; the runs of the last angle are apart.
    angles = [*ANGLES, 1.234, 0.0, ANGLES[7]]
    layer = OrientedConv1d(len(angles), kernel_size, stride, angles=angles, residual=residual).double()
    x = torch.randn(2, len(angles), 19, 26, dtype=torch.float64)
    expected = oriented_conv1d(x, layer.weight, angles, layer.bias, stride=stride, residual=residual)
    actual = export.BoxConv2d(layer)(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_boxes_follow_angles_that_were_loaded() -> None:
    layer = OrientedConv1d(4, 5)
    layer.load_state_dict({**layer.state_dict(), "theta": torch.full((4,), 1.0)})
    assert [kernel.shape for kernel in export.BoxConv2d(layer).kernels] == [(4, 1, 3, 3)]


def test_boxes_of_layers_in_onnxruntime(tmp_path: Path) -> None:
    model = Layers().eval()
    images = torch.randn(3, 3, 33, 40)
    export.export_onnx(model, tmp_path / "layers.onnx", size=24, dynamic_size=True)
    with torch.no_grad():
        expected = model(images)
    actual = run_onnx(tmp_path / "layers.onnx", images)
    assert len(actual) == 12
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("kernels", "size"), [("2d", 64), ("1d", 75), ("1dpp", 97), ("2dpp", 66)])
def test_networks_in_onnxruntime(kernels: str, size: int, tmp_path: Path) -> None:
    model = small(kernels)
    path = tmp_path / "model.onnx"
    difference = export.export_onnx(model, path, size)
    assert difference is not None
    assert difference < 1e-4
    assert list(tmp_path.iterdir()) == [path]  # no second file with the weights
    for batch in (1, 3):
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected = model(images)
        (actual,) = run_onnx(path, images)
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    file = onnx.load(path)
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert PACKAGE not in path.read_bytes()  # no paths of the machine it was made on
    assert [output.name for output in file.graph.output] == ["logits"]


def test_features_of_any_size_at_an_opset(tmp_path: Path) -> None:
    model = small("1dpp", features_only=True, depths=(1, 1, 1, 1))
    path = tmp_path / "features.onnx"
    export.export_onnx(model, path, 64, dynamic_size=True, opset=21)
    images = torch.randn(2, 3, 101, 131)
    with torch.no_grad():
        expected = model(images)
    actual = run_onnx(path, images)
    assert [tuple(a.shape) for a in actual] == [(2, 16, 26, 33), (2, 32, 13, 16), (2, 48, 6, 8), (2, 64, 3, 4)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-4)
    file = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 21)]
    assert [output.name for output in file.graph.output] == ["features0", "features1", "features2", "features3"]


def test_the_model_itself_stays_as_it_is() -> None:
    model = small("2dpp")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    boxes = export.with_boxes(model)
    assert sum(isinstance(module, OrientedConv1d) for module in model.modules()) == 5
    assert not any(isinstance(module, OrientedConv1d) for module in boxes.modules())
    for parameter in boxes.parameters():
        parameter.data.fill_(math.nan)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("what was there")
    model = nn.Conv2d(3, 4, 3)

    def changed(model: nn.Module) -> nn.Module:
        other = nn.Conv2d(3, 4, 3)
        other.load_state_dict(model.state_dict())
        other.bias.data[2] += 1e-3
        return other

    monkeypatch.setattr(export, "with_boxes", changed)
    with pytest.raises(RuntimeError, match=r"onnxruntime: expected the outputs of PyTorch within 0.0001, got 0.00"):
        export.export_onnx(model, path, 16)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kernels", ["2d", "1d", "1dpp", "2dpp"])
def test_programs(kernels: str, tmp_path: Path) -> None:
    model = small(kernels)
    path = tmp_path / "model.pt2"
    assert export.export_program(model, path, 75) <= 1e-6
    assert PACKAGE not in path.read_bytes()  # no paths of the machine it was made on
    program = torch.export.load(path)
    calls = sum(node.target is torch.ops.oriented1d.oriented_conv1d.default for node in program.graph.nodes)
    assert calls == {"2d": 0, "1d": 7, "1dpp": 12, "2dpp": 5}[kernels]
    for batch in (1, 3):
        images = torch.randn(batch, 3, 75, 75)
        with torch.no_grad():
            expected, actual = model(images), program.module()(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_program_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = small("1dpp")
    export.export_program(model, tmp_path / "model.pt2", 64)
    program = torch.export.load(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(images), model(images), rtol=0, atol=1e-5)


def test_a_program_of_any_size_in_another_process(tmp_path: Path) -> None:
    model = small("1d")
    export.export_program(model, tmp_path / "model.pt2", 64, dynamic_size=True)
    images = torch.randn(3, 3, 70, 99)
    with torch.no_grad():
        expected = model(images)
    torch.save(images, tmp_path / "images.pt")
    code = """
import torch, oriented1d
images = torch.load("images.pt")
torch.save(torch.export.load("model.pt2").module()(images), "logits.pt")
"""
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}){code}"], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)


def test_costs_of_boxes() -> None:
    rows = {(k, round(math.degrees(angle), 1)): (size, ratio) for k, angle, size, ratio in export.box_costs(Layers())}
    assert len(rows) == 24
    assert rows[31, 0.0] == ((1, 31), 1.0)
    assert rows[31, 90.0] == ((31, 1), 1.0)
    assert rows[31, 45.0] == ((21, 21), 441 / 31)
    assert rows[31, 22.5] == ((11, 27), 297 / 31)  # trunc(15 * 0.38) and trunc(15 * 0.92) to each side
    assert rows[31, 67.5] == ((27, 11), 297 / 31)
    assert rows[1, 45.0] == ((1, 1), 1.0)


def test_costs_of_a_network_are_printed() -> None:
    lines = export.cost_lines(timm.create_model("convnext_tiny_1d"), 224)
    assert lines[-1] == "multiply-adds of the network at 224x224: 5.20 G with boxes, 4.46 G with taps (1.17)"
    assert any("45° 21x21 (14.2)" in line for line in lines)
    assert export.cost_lines(nn.Conv2d(3, 3, 3), 32) == []


def test_the_command(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    options = {**SMALL, "stem_dim": 16, "layer_scale_init_value": 0.5}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{**options, **kwargs}))
    model = timm.create_model("convnext_tiny_1d").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    path = tmp_path / "new folder" / "mine.onnx"
    arguments = ["convnext_tiny_1d", str(path), "--to", "onnx", "--size", "64"]
    assert export.main([*arguments, "--weights", str(tmp_path / "mine.pth")]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of onnxruntime to PyTorch: " in printed
    assert "random" not in printed
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(path, images)[0], model(images), rtol=0, atol=1e-5)

    path = tmp_path / "mine.pt2"
    assert export.main(["convnext_tiny_1d", str(path), "--to", "torch-export", "--size", "64", "--features"]) == 0
    printed = capsys.readouterr().out
    assert "the weights are random" in printed
    assert "import oriented1d" in printed
    assert [tuple(y.shape[1:]) for y in torch.export.load(path).module()(images)][-1] == (64, 2, 2)


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = {"onnxruntime"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
    )
    path = tmp_path / "model.onnx"
    model = nn.Conv2d(3, 4, 3)
    assert export.export_onnx(model, path, 16) is None
    assert path.exists()
    for package in ("onnx", "onnxscript"):
        missing.add(package)
        with pytest.raises(UserError, match=rf"needs {package}, .*: pip install 'oriented1d\[export\]'"):
            export.export_onnx(model, path, 16)
        missing.remove(package)


def test_an_opset_that_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--opset: expected a version that PyTorch can write for this network, got 999"):
        export.export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "model.onnx", 16, opset=999)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt2", "--to", "onnx"], "out: expected a name that ends in .onnx, got model.pt2"),
        (["model.onnx", "--to", "torch-export"], "out: expected a name that ends in .pt2, got model.onnx"),
        (["model.onnx", "--to", "onnx", "--size", "0"], "--size: expected at least 1, got 0"),
        (["model.pt2", "--to", "torch-export", "--opset", "18"], "--opset: expected --to onnx beside it"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        export.main(["convnext_tiny_1d", *arguments])
    assert message in capsys.readouterr().err
