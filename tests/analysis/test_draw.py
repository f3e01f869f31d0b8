import math

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

from oriented1d import OrientedConv1d, geometry
from oriented1d.analysis import draw, figures
from oriented1d.training.errors import UserError


def run(angle: float, kernel_size: int) -> geometry.DirectionTaps:
    return geometry.layer_taps(geometry.directions([angle]), kernel_size).runs[0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    kept: list[Figure] = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, output: (kept.append(figure), save(figure, output)))
    return kept


def pictures(figure: Figure) -> list[list[np.ndarray]]:
    """Arrays shown, row by row; no tap is NaN."""
    rows: dict[int, list[np.ndarray]] = {}
    for ax in figure.axes:
        for image in ax.images:
            rows.setdefault(ax.get_subplotspec().rowspan.start, []).append(image.get_array().filled(np.nan))
    return [rows[key] for key in sorted(rows)]


def test_kernel_image_holds_the_weights_where_the_taps_are() -> None:
    image = draw.kernel_image(np.arange(1.0, 6.0), run(0.0, 5))
    assert image[2].tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(np.delete(image, 2, axis=0)).all()
    upwards = draw.kernel_image(np.arange(1.0, 6.0), run(math.pi / 2, 5))
    assert upwards[:, 2].tolist() == [5, 4, 3, 2, 1]


def test_weights_of_taps_on_one_pixel_add_up() -> None:
    image = draw.kernel_image(np.ones(31), run(math.pi / 4, 31))
    assert np.nansum(image) == 31
    assert np.isfinite(image).sum() == 21
    assert np.nanmax(image) == 3  # at 45 degrees -1, 0 and 1 truncate to the centre


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_written_whole(tmp_path, suffix: str) -> None:
    path = tmp_path / "new folder" / f"taps.{suffix}"
    assert draw.main(["--kernel-size", "7", "--output", str(path)]) == 0
    assert path.stat().st_size > 2000
    assert list(path.parent.iterdir()) == [path]


def test_taps_of_the_command(tmp_path, drawn) -> None:
    assert draw.main(["--kernel-size", "5", "--num-directions", "4", "--output", str(tmp_path / "taps.png")]) == 0
    (images,) = pictures(drawn[0])
    assert len(images) == 4
    expected = np.full((5, 5), np.nan)
    expected[2] = 1
    np.testing.assert_array_equal(images[0], expected)
    expected = np.full((5, 5), np.nan)  # at 45 degrees 0.7 and 1.4 truncate to 0 and 1
    expected[2, 2], expected[1, 3], expected[3, 1] = 3, 1, 1
    np.testing.assert_array_equal(images[1], expected)


def cross() -> OrientedConv1d:
    """Two channels at 0 and two at 90 degrees, whose weights are small numbers."""
    layer = OrientedConv1d(4, 3, num_directions=2, residual=True)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([[1.0, -2, 3], [3.0, 2, -5], [10.0, 20, -30], [-30.0, 0, -10]]).reshape(layer.weight.shape)
        )
    return layer


def test_direction_images_are_mean_magnitudes() -> None:
    images = draw.direction_images(cross())
    nan = math.nan
    assert list(images) == pytest.approx([0.0, math.pi / 2])
    horizontal, vertical = images.values()
    np.testing.assert_array_equal(horizontal, [[nan, nan, nan], [2, 2, 4], [nan, nan, nan]])
    np.testing.assert_array_equal(vertical, [[nan, 20, nan], [nan, 10, nan], [nan, 20, nan]])


def test_directions_add_up_to_a_2d_kernel() -> None:
    nan = math.nan
    np.testing.assert_array_equal(draw.sum_over_directions(cross()), [[nan, 20, nan], [2, 12, 4], [nan, 20, nan]])


def test_weights_on_one_pixel_add_up_before_their_magnitude() -> None:
    layer = OrientedConv1d(1, 31, angles=[math.pi / 4])
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 0, 14:17] = torch.tensor([1.0, 2.0, -4.0])  # all on the centre
    assert draw.sum_over_directions(layer)[15, 15] == 1.0
    assert np.nansum(draw.sum_over_directions(layer)) == 1.0


def test_channels_of_one_angle_need_not_be_neighbours() -> None:
    layer = OrientedConv1d(3, 3, angles=[0.0, math.pi / 2, 0.0])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 5.0, 3.0])[:, None, None, None].expand_as(layer.weight))
    images = draw.direction_images(layer)
    assert len(images) == 2
    assert images[0.0][1].tolist() == [2, 2, 2]
    assert draw.sum_over_directions(layer)[1, 1] == 7


def test_learned_kernels(tmp_path, drawn) -> None:
    model = nn.Sequential(OrientedConv1d(16, 7), nn.ReLU(), OrientedConv1d(16, 5, layer_offset=0.5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[1, 0, 0] = torch.arange(-3.0, 4.0)
    draw.draw_kernels(model, tmp_path / "kernels.png", kernels_per_direction=1)
    assert (tmp_path / "kernels.png").stat().st_size > 2000
    strongest, means, others, other_means = pictures(drawn[0])
    assert [len(row) for row in (strongest, means, others, other_means)] == [8, 9, 8, 9]
    np.testing.assert_allclose(strongest[0][3], np.arange(-3, 4) / 3)  # channel 1, at 0 degrees
    np.testing.assert_array_equal(means[0][3], np.abs(np.arange(-3, 4)) / 2)
    np.testing.assert_array_equal(means[-1], draw.sum_over_directions(model[0]))
    # Columns are in the order of the angles, though this layer starts at 90 degrees.
    weights = model[2].weight.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(other_means[0][2], np.abs(weights[8:10]).mean(axis=0))
    np.testing.assert_allclose(other_means[4][::-1, 2], np.abs(weights[0:2]).mean(axis=0))
    np.testing.assert_array_equal(other_means[-1], draw.sum_over_directions(model[2]))


def test_a_layer_of_a_checkpoint(tmp_path, drawn, monkeypatch) -> None:
    options = {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 16), "stem_dim": 16, "num_classes": 3}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{**options, **kwargs}))
    torch.manual_seed(1)  # random weights of the command have seed 0
    model = timm.create_model("convnext_tiny_1dpp")
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    layer = "stages.2.0.dwconv2"
    arguments = ["convnext_tiny_1dpp", "--layer", layer, "--output", str(tmp_path / "k.png")]
    assert draw.main([*arguments, "--weights", str(tmp_path / "mine.pth")]) == 0
    expected = draw.sum_over_directions(model.get_submodule(layer))
    assert expected.shape == (31, 31)
    np.testing.assert_array_equal(pictures(drawn[0])[1][-1], expected)
    assert drawn[0].get_suptitle().startswith("convnext_tiny_1dpp, weights of mine.pth\n")
    assert draw.main(arguments) == 0
    assert drawn[1].get_suptitle().startswith("convnext_tiny_1dpp, random weights\n")
    assert not np.array_equal(pictures(drawn[1])[1][-1], expected, equal_nan=True)
    with pytest.raises(UserError, match=r"layer: expected one of downsample_layers.0.dw1, .*; got stages"):
        draw.main([*arguments[:1], "--layer", "stages"])
    with pytest.raises(UserError, match="model: expected a network with oriented layers, got ConvNeXt"):
        draw.main(["convnext_tiny_2d", "--output", str(tmp_path / "never.png")])
    assert not (tmp_path / "never.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
        (["--kernel-size", "0"], "--kernel-size: expected an odd number, got 0"),
        (["--num-directions", "0"], "--num-directions: expected at least 1, got 0"),
        (["--weights", "a.pth"], "--weights: expected a network beside it"),
        (["convnext_tiny_1d", "--kernel-size", "7"], "--kernel-size: expected no network beside it"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        draw.main(arguments)
    assert message in capsys.readouterr().err


def test_a_model_without_oriented_layers() -> None:
    with pytest.raises(UserError, match="model: expected a network with oriented layers, got Linear without any"):
        draw.draw_kernels(nn.Linear(2, 2), "never.png")
