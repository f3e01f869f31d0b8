import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from oriented1d import OrientedConv1d, cli, geometry
from oriented1d.analysis import erf, figures
from oriented1d.training.errors import UserError


class FeaturesOf(nn.Module):
    """A layer as a network: its output is the last feature map, in the given format, or what ``change`` makes of it."""

    def __init__(self, layer: nn.Module, output_fmt: str = "NCHW", change=lambda features: features) -> None:
        super().__init__()
        self.layer = layer
        self.output_fmt = output_fmt
        self.change = change

    def forward_features(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


def oriented(weight: Tensor, stride: int = 1, bias: float = 0.0, **options) -> OrientedConv1d:
    layer = OrientedConv1d(len(weight), weight.shape[1], stride=stride, **options)
    with torch.no_grad():
        layer.weight.copy_(weight[:, None, None])
        assert layer.bias is not None
        layer.bias.fill_(bias)
    return layer.eval()


def tap_scores(layer: OrientedConv1d, size: int) -> np.ndarray:
    """What the taps say: each channel's weights on the pixels that the centre output reads, relu'd, then added up."""
    total = np.zeros((size, size))
    centre = layer.stride * (-(-size // layer.stride) // 2)
    for channel, angle in enumerate(layer.theta.tolist()):
        scores = np.zeros((size, size))
        taps = geometry.kernel_taps(angle, layer.kernel_size)
        for (dy, dx), weight in zip(taps, layer.weight[channel, 0, 0].tolist(), strict=True):
            if 0 <= centre + dy < size and 0 <= centre + dx < size:
                scores[centre + dy, centre + dx] += weight
        total += np.maximum(scores, 0)
    return total


@pytest.mark.parametrize(("size", "stride"), [(64, 1), (37, 1), (64, 2), (37, 2), (21, 1)])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_single_oriented_layer_gives_its_taps(size: int, stride: int, offset: float) -> None:
    # Whole numbers: sums of taps on one pixel are exact in float32.
    layer = oriented(torch.randint(1, 50, (8, 31)).float(), stride, layer_offset=offset)
    scores = erf.compute(FeaturesOf(layer).eval(), [torch.rand(8, size, size) for _ in range(3)], number=2)
    expected = tap_scores(layer, size)
    assert np.count_nonzero(expected) >= 100
    np.testing.assert_array_equal(scores.total, 2 * expected)
    assert (scores.count, scores.seen, scores.left_out) == (2, 2, 0)


def test_one_direction_is_one_line() -> None:
    layer = oriented(torch.arange(1.0, 8.0)[None], angles=[0.0])
    total = erf.compute(FeaturesOf(layer).eval(), [torch.rand(1, 16, 16)]).total
    assert total[8, 5:12].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert total.sum() == 28


def test_negative_weights_count_after_taps_on_one_pixel_are_added() -> None:
    layer = oriented(torch.randint(-50, 50, (8, 31)).float(), bias=1e6)
    total = erf.compute(FeaturesOf(layer).eval(), [torch.rand(8, 48, 48)]).total
    expected = tap_scores(layer, 48)
    assert 50 < np.count_nonzero(expected) < 200
    np.testing.assert_array_equal(total, expected)


def test_features_below_zero_do_not_count() -> None:
    layer = oriented(torch.randint(1, 50, (8, 15)).float())
    with torch.no_grad():
        layer.bias[3] = -1e6
    total = erf.compute(FeaturesOf(layer).eval(), [torch.rand(8, 32, 32)]).total
    expected = tap_scores(layer, 32)
    layer.weight.data[3] = 0
    assert expected.sum() > tap_scores(layer, 32).sum() == total.sum()


def test_scores_are_averaged_not_signed_gradients() -> None:
    """Images with opposite gradients: relu comes before the sum over images."""
    layer = FeaturesOf(nn.Conv2d(1, 1, 1, bias=False), change=lambda y: y.abs())
    nn.init.constant_(layer.layer.weight, 3.0)
    images = [torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), -1.0)]
    total = erf.compute(layer.eval(), images).total
    assert total[2, 2] == 3 == total.sum()


def horizontal(kernels: str, stem_too: bool) -> nn.Module:
    """A small network without a vertical kernel; the stem's second layer, turned by 90 degrees, is turned back too."""
    model = timm.create_model(
        f"convnext_atto_{kernels}",
        depths=(2, 1, 2, 1),
        dims=(8, 8, 8, 8),
        stem_dim=8,
        num_directions=1,
        layer_scale_init_value=1.0,
    )
    state = model.state_dict()
    for key in state:
        if key.endswith("theta") and (stem_too or not key.startswith("downsample_layers.0")):
            state[key] = torch.zeros_like(state[key])
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("kernels", ["1d", "1dpp"])
def test_horizontal_kernels_have_no_vertical_spread(kernels: str) -> None:
    # Rows only mix where 2x2 convolutions between stages join two: the centre row p joins rows 8p .. 8p+7 of the
    # stem's output, and a horizontal stem of two steps of 2 reads row 4r of the image for its row r.
    images = [torch.randn(3, 128, 128) for _ in range(4)]
    total = erf.compute(horizontal(kernels, stem_too=True), images).total
    p = 4 // 2
    assert np.flatnonzero(total.any(axis=1)).tolist() == [4 * (8 * p + k) for k in range(8)]
    assert total.any(axis=0).all()


@pytest.mark.parametrize(("kernels", "radius"), [("1d", 15), ("1dpp", 7)])
def test_the_second_layer_of_the_stem_is_vertical_with_one_direction(kernels: str, radius: int) -> None:
    # Row s of the stem reads rows 2s - radius .. 2s + radius of its first layer, which reads row 2r of the image for
    # its row r. Nothing else of the network adds rows.
    total = erf.compute(horizontal(kernels, stem_too=False), [torch.randn(3, 128, 128) for _ in range(4)]).total
    first, last = 2 * (2 * 16 - radius), 2 * (2 * 23 + radius)
    assert np.flatnonzero(total.any(axis=1)).tolist() == list(range(first, last + 1, 2))


def test_all_directions_spread_vertically() -> None:
    model = timm.create_model("convnext_atto_1d", dims=(8, 8, 8, 8), stem_dim=8, layer_scale_init_value=1.0).eval()
    total = erf.compute(model, [torch.randn(3, 128, 128)]).total
    assert total.any(axis=0).all()
    assert total.any(axis=1).all()


def test_maps_of_either_format() -> None:
    layer = oriented(torch.randint(1, 50, (8, 15)).float())
    images = [torch.rand(8, 24, 32)]  # not square: a mistaken axis would show
    first = erf.compute(FeaturesOf(layer).eval(), images).total
    last = erf.compute(FeaturesOf(layer, "NHWC", lambda y: y.permute(0, 2, 3, 1)).eval(), images).total
    assert np.count_nonzero(first) > 60
    assert first[12, 16] == first.max()
    np.testing.assert_array_equal(first, last)


def test_swin_and_a_residual_network_of_timm() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1)).eval()
    resnet = timm.create_model("resnet18").eval()
    for model in (swin, resnet):
        total = erf.compute(model, [torch.randn(3, 64, 64)]).total
        assert total.shape == (64, 64)
        # The centre of the 2x2 map is its last position, which stands for the lower right quarter.
        assert total[32:, 32:].mean() > total[:32, :32].mean() > 0


def test_images_do_not_mix_in_a_batch() -> None:
    model = timm.create_model("resnet10t").eval()
    images = [torch.randn(3, 64, 64) for _ in range(5)]
    one = erf.compute(model, images, batch_size=1).total
    three = erf.compute(model, images, batch_size=3).total
    np.testing.assert_allclose(three, one, rtol=1e-4, atol=1e-6 * one.max())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FeaturesOf(nn.Conv2d(3, 4, 1), change=lambda y: y.flatten(2).mT), r"got shape \(1, 64, 4\) from FeaturesOf"),
        (FeaturesOf(nn.Conv2d(3, 4, 1), change=lambda y: [y, y]), "got a list from FeaturesOf"),
        (nn.Conv2d(3, 4, 1), "expected a network with forward_features, got Conv2d without it"),
    ],
)
def test_networks_without_a_map_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        erf.compute(model.eval(), [torch.rand(3, 8, 8)])


def test_training_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected evaluation mode, got training mode"):
        erf.compute(FeaturesOf(nn.Conv2d(3, 4, 1)).train(), [torch.rand(3, 8, 8)])


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_smallest_squares_against_trying_them_all(size: int) -> None:
    for seed, share in itertools.product(range(5), erf.SHARES):
        values = np.random.default_rng(seed).random((size, size)) ** (1 + 4 * seed)
        c = size // 2
        for radius in range(size):
            part = values[max(0, c - radius) : c + radius + 1, max(0, c - radius) : c + radius + 1]
            if part.sum() > share * values.sum():
                break
        assert erf.square_side(values, share) == min(2 * radius + 1, size)


def test_squares_of_known_matrices() -> None:
    uniform = np.ones((101, 101))
    assert [erf.square_side(uniform, share) for share in erf.SHARES] == [47, 57, 73, 101]
    dot = np.zeros((64, 64))
    dot[32, 32] = 1
    assert erf.square_side(dot, 0.99) == 1
    dot[32, 32], dot[0, 0] = 0, 1  # only the whole image, whose side is even, holds it
    assert erf.square_side(dot, 0.2) == 64


def test_rescaling() -> None:
    matrix = np.array([[0.0, 9.0], [99.0, 999.0]])
    np.testing.assert_allclose(erf.rescaled(matrix), [[0, 1 / 3], [2 / 3, 1]])
    np.testing.assert_allclose(erf.rescaled(matrix, raw=True), matrix / 999)
    tiny = np.array([[1e-20, 2e-20]])  # log10(x + 1) is 0 for both
    np.testing.assert_allclose(erf.rescaled(tiny), [[0.5, 1]])
    with pytest.raises(ValueError, match="expected a positive score somewhere"):
        erf.rescaled(np.zeros((2, 2)))


class Stops(list):
    """Images of a run that is interrupted when it comes to one of them."""

    at = 5

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, batch_size: int) -> None:
    monkeypatch.setattr(erf, "SAVE_SECONDS", 0.0)
    model = timm.create_model("convnext_atto_1d", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    images = [torch.randn(3, 64, 64) for _ in range(9)]
    images[1] = torch.full((3, 64, 64), torch.nan)  # left out, before the stop
    whole = erf.compute(model, images, 7, batch_size)
    partial, settings = tmp_path / "erf.partial", {"size": 64, "ema": None}
    with pytest.raises(KeyboardInterrupt):
        erf.compute(model, Stops(images), 7, batch_size, partial, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["erf.partial"]
    seen = []
    used = erf.contributions
    monkeypatch.setattr(erf, "contributions", lambda model, x: (seen.append(len(x)), used(model, x))[1])
    resumed = erf.compute(model, images, 7, batch_size, partial, settings)
    assert sum(seen) == (3 if batch_size == 1 else 4)
    assert (resumed.count, resumed.seen) == (whole.count, whole.seen) == (7, 8)
    assert whole.total.max() > 0
    np.testing.assert_array_equal(resumed.total, whole.total)


def image_folder(folder: Path, number: int = 4) -> Path:
    random = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"class{i % 2}" / f"{9 - i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return folder


def command(*arguments: object) -> list[str]:
    return ["erf", "compute", "convnext_atto_2d", "--size", "64", "--device", "cpu", *map(str, arguments)]


def error_of(capsys) -> str:
    return capsys.readouterr().err.strip().removeprefix("oriented1d erf: error: ")


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path, capsys) -> None:
    arguments = command("--images", 6, "--output", tmp_path / "killed.npz")
    kill = (
        "import os, signal; from oriented1d import cli; from oriented1d.analysis import erf\n"
        "erf.SAVE_SECONDS, read = 0, erf.Images.__getitem__\n"
        "erf.Images.__getitem__ = lambda s, i: os.kill(os.getpid(), signal.SIGKILL) if i == 4 else read(s, i)\n"
        f"cli.main({arguments!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", kill], timeout=300, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    with np.load(tmp_path / "killed.npz.partial") as file:
        assert file["count"] == 4
    assert not (tmp_path / "killed.npz").exists()
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert f"going on from {tmp_path / 'killed.npz.partial'}" in capsys.readouterr().out
    assert cli.main(command("--images", 6, "--output", tmp_path / "whole.npz")) == 0
    killed_erf, whole = erf.load(tmp_path / "killed.npz"), erf.load(tmp_path / "whole.npz")
    assert whole.matrix.max() > 0
    np.testing.assert_array_equal(killed_erf.matrix, whole.matrix)
    assert killed_erf.metadata["images"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "whole.npz"]


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> list[str]:
    """A command whose partial file is there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    monkeypatch.setattr(erf, "SAVE_SECONDS", 0.0)
    data = image_folder(tmp_path / "data", number=8)
    arguments = command("--images", 6, "--data", data, "--output", tmp_path / "erf.npz")
    read = erf.Images.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(
            erf.Images, "__getitem__", lambda s, i: read(s, i) if i < 3 else signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            cli.main(arguments)
    assert (tmp_path / "erf.npz.partial").exists()
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convnext_atto_2d": "convnext_atto_1d"}, "model convnext_atto_2d, expected convnext_atto_1d"),
        ({"64": "96"}, "size 64, expected 96"),
        ({"6": "7"}, "images_asked 6, expected 7"),
    ],
)
def test_a_partial_file_of_other_settings_is_refused(stopped, tmp_path, capsys, change, message: str) -> None:
    assert cli.main([change.get(argument, argument) for argument in stopped]) == 1
    expected = f"output: {tmp_path / 'erf.npz.partial'} is an unfinished run with {message}; go on with the options"
    assert error_of(capsys).startswith(expected)
    assert not (tmp_path / "erf.npz").exists()


def test_changed_weights_and_images_are_noticed(stopped, tmp_path, monkeypatch, capsys) -> None:
    extra = tmp_path / "data" / "class0" / "0.png"
    extra.write_bytes((tmp_path / "data" / "class0" / "9.png").read_bytes())
    assert cli.main(stopped) == 1
    assert "is an unfinished run with names_of_images_sha256 " in error_of(capsys)
    extra.unlink()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert cli.main(stopped) == 1
    assert "is an unfinished run with weights_sha256 " in error_of(capsys)


def test_another_batch_size_may_go_on(stopped, tmp_path) -> None:
    assert cli.main([*stopped, "--batch-size", "2"]) == 0
    assert erf.load(tmp_path / "erf.npz").metadata["images"] == 6


def test_a_partial_file_that_is_something_else(tmp_path, capsys) -> None:
    (tmp_path / "erf.npz.partial").write_text("not a run")
    assert cli.main(command("--output", tmp_path / "erf.npz")) == 1
    assert "erf.npz.partial is no unfinished run that can be read; remove it to start over" in error_of(capsys)


def test_folders_of_images(tmp_path) -> None:
    model = timm.create_model("convnext_atto_2d")
    folder = image_folder(tmp_path / "data")
    (folder / "notes.txt").write_text("no image")
    images = erf.Images(str(folder), model, 80)
    assert images.names == ["class0/7.png", "class0/9.png", "class1/6.png", "class1/8.png"]
    pixels = np.asarray(Image.open(folder / "class0" / "7.png"), np.float64)[:, 10:90] / 255  # shorter side 80: a crop
    expected = (pixels - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    np.testing.assert_allclose(images[0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert images[1].shape == (3, 80, 80)
    assert erf.Images(str(folder), model, 40)[0].shape == (3, 40, 40)


def test_linked_folders_are_followed(tmp_path) -> None:
    image_folder(tmp_path / "data")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(tmp_path / "data" / "class1")
    images = erf.Images(str(tmp_path / "links"), timm.create_model("convnext_atto_2d"), 32)
    assert images.names == ["one/6.png", "one/8.png"]


def test_digits() -> None:
    model = timm.create_model("convnext_atto_2d", pretrained_cfg_overlay={"mean": (0, 0, 0), "std": (1, 1, 1)})
    images = erf.Images("digits", model, 8)
    assert len(images) == 1797
    from sklearn.datasets import load_digits

    for i in (0, 1796):
        grey = np.rint(load_digits().images[i] / 16 * 255) / 255
        np.testing.assert_allclose(images[i].numpy(), np.broadcast_to(grey, (3, 8, 8)), atol=1e-6)


def test_fewer_images_than_asked_for(tmp_path, capsys) -> None:
    data = image_folder(tmp_path / "data")
    (data / "class0" / "8.png").write_bytes(b"not an image")
    assert cli.main(command("--data", data, "--output", tmp_path / "erf.npz")) == 0
    printed = capsys.readouterr().out
    assert f"data: {data} has 5 images, fewer than the 50 asked for; all are used" in printed
    assert f"image 2 left out: {data / 'class0' / '8.png'}: expected an image, cannot be read" in printed
    assert "convnext_atto_2d at 64, average of 4 images" in printed
    saved = erf.load(tmp_path / "erf.npz")
    assert [saved.metadata[key] for key in ("images_asked", "images", "images_left_out")] == [50, 4, 1]
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto_2d").eval()
    images = erf.Images(str(data), model, 64)
    good = torch.stack([images[i] for i in (0, 2, 3, 4)])
    expected = sum(erf.contributions(model, image[None])[0].double() for image in good) / 4
    np.testing.assert_allclose(saved.matrix, expected.numpy(), rtol=1e-5)


def test_images_of_which_none_can_be_used(capsys) -> None:
    model = FeaturesOf(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(UserError, match="data: none of the 2 images could be used"):
        erf.compute(model, [torch.full((3, 8, 8), torch.nan)] * 2)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"image {i} left out: expected finite features and gradients, got NaN or infinity" for i in (1, 2)
    ]


def test_metadata(tmp_path, monkeypatch) -> None:
    model = timm.create_model("convnext_atto_2d")
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": ema}, tmp_path / "weights.pth")
    out = tmp_path / "new" / "erf.npz"
    given = ["--weights", tmp_path / "weights.pth", "--images", 3, "--output"]
    assert cli.main(command(*given, out)) == 0
    saved = erf.load(out)
    assert saved.matrix.shape == (64, 64)
    assert saved.matrix.dtype == np.float64
    metadata = saved.metadata
    expected = {
        "model": "convnext_atto_2d",
        "weights": str(tmp_path / "weights.pth"),
        "ema": False,
        "size": 64,
        "data": "digits",
        "images_asked": 3,
        "images": 3,
        "images_left_out": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["versions"]["torch"] == torch.__version__
    assert set(metadata) - set(expected) == {"names_of_images_sha256", "weights_sha256", "versions", "date"}
    images = erf.Images("digits", model, 64)
    total = erf.compute(model.eval(), images, 3).total
    np.testing.assert_allclose(saved.matrix, total / 3, rtol=1e-6)
    erf.save(saved, tmp_path / "again.npz")
    again = erf.load(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.matrix, saved.matrix)
    assert again.metadata == metadata
    assert cli.main(command("--ema", *given, out)) == 0
    assert erf.load(out).metadata["ema"] is True
    assert erf.load(out).metadata["weights_sha256"] != metadata["weights_sha256"]
    assert [path.name for path in out.parent.iterdir()] == ["erf.npz"]


def test_several_are_drawn_on_one_scale(tmp_path, monkeypatch, capsys) -> None:
    weak, strong = np.zeros((64, 64)), np.zeros((33, 33))
    weak[30:35, 30:35] = 1e-3
    strong[16, 16], strong[16, 0] = 999, 99
    for name, matrix in (("weak", weak), ("strong", strong)):
        erf.save(erf.Erf(matrix, {"images": 7}), tmp_path / f"{name}.npz")
    drawn: list[Figure] = []
    written = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, output: (drawn.append(figure), written(figure, output)))
    arguments = ["erf", "plot", str(tmp_path / "weak.npz"), str(tmp_path / "strong.npz"), "--output"]
    assert cli.main([*arguments, str(tmp_path / "log.png"), "--names", "a", "b"]) == 0
    printed = capsys.readouterr().out
    # 25 equal pixels: the square of side 3 holds 9 / 25, of side 5 all. log10(1000) is 3 and log10(100) is 2.
    assert row(printed, "a") == [
        "64", "7", f"3 ({9 / 4096:.4f})", f"3 ({9 / 4096:.4f})", f"5 ({25 / 4096:.4f})", f"5 ({25 / 4096:.4f})"
    ]  # fmt: skip
    assert row(printed, "b") == ["33", "7", "1 (0.0009)", "1 (0.0009)", "1 (0.0009)", "33 (1.0000)"]
    assert cli.main([*arguments, str(tmp_path / "raw.pdf"), "--raw"]) == 0
    printed = capsys.readouterr().out
    assert "raw scores" in printed
    assert row(printed, "strong")[-1] == "33 (1.0000)"
    logarithmic, raw = drawn
    for figure in drawn:
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert [ax.images[0].get_clim() for ax in panels] == [(0.0, 1.0)] * 2
        assert [ax.get_xlim() for ax in panels] == [(-32.5, 31.5)] * 2
        assert [ax.get_ylim() for ax in panels] == [(31.5, -32.5)] * 2
        assert panels[1].images[0].get_extent() == [-16.5, 16.5, 16.5, -16.5]
        assert [patch.get_width() for patch in panels[0].patches] == [3, 3, 5, 5]
    assert [ax.get_title() for ax in logarithmic.axes[:2]] == ["a", "b"]
    assert logarithmic.axes[1].images[0].get_array()[16, 0] == pytest.approx(2 / 3)
    assert raw.axes[1].images[0].get_array()[16, 0] == pytest.approx(99 / 999)
    assert (tmp_path / "log.png").stat().st_size > 2000
    assert (tmp_path / "raw.pdf").stat().st_size > 2000


def row(printed: str, name: str) -> list[str]:
    """The cells of a row of the printed table, after its name."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    (found,) = [line[1:] for line in cells if line[0] == name]
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data: expected a folder of images or 'digits', got nowhere, which is no folder"),
        (["--data", "."], "data: no image files in . and below"),
        (["--ema"], "ema: expected a checkpoint file in --weights beside it, got none"),
        (["--weights", "no.pth"], "weights: no.pth: no such checkpoint file"),
    ],
)
def test_bad_input_of_compute(tmp_path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command("--output", "erf.npz", *arguments)) == 1
    assert error_of(capsys) == message
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers_unknown_networks_and_tokens(tmp_path, capsys) -> None:
    output = ["--output", str(tmp_path / "erf.npz"), "--device", "cpu"]
    assert cli.main(["erf", "compute", "resnet18", *output, "--size", "0"]) == 2
    assert "argument --size: expected at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["erf", "compute", "convnext_ato_1d", *output]) == 1
    assert "expected a network that timm knows, got 'convnext_ato_1d'" in error_of(capsys)
    assert cli.main(["erf", "compute", "vit_tiny_patch16_224", *output, "--size", "32"]) == 1
    assert "got shape (1, 5, 192) from VisionTransformer; networks of tokens" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_plot(tmp_path, capsys) -> None:
    plot = ["erf", "plot", "--output", str(tmp_path / "plot.png")]
    assert cli.main([*plot, str(tmp_path / "no.npz")]) == 1
    assert error_of(capsys) == f"{tmp_path / 'no.npz'}: cannot be read (No such file or directory)"
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    for name in ("text.npz", "other.npz"):
        assert cli.main([*plot, str(tmp_path / name)]) == 1
        assert error_of(capsys) == f"{tmp_path / name}: expected a file of `oriented1d erf compute`, got something else"
    erf.save(erf.Erf(np.zeros((4, 4)), {}), tmp_path / "dead.npz")
    assert cli.main([*plot, str(tmp_path / "dead.npz")]) == 1
    assert error_of(capsys) == "dead: matrix: expected a positive score somewhere, got none"
    assert cli.main([*plot, str(tmp_path / "dead.npz"), "--names", "a", "b"]) == 1
    assert error_of(capsys) == "names: expected one for each of the 1 files, got 2"
    assert not (tmp_path / "plot.png").exists()
