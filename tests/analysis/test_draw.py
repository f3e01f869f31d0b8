import math

import numpy as np
import pytest
import torch
from torch import nn

from oriented1d import OrientedConv1d, geometry
from oriented1d.analysis import draw


def run(angle: float, kernel_size: int) -> geometry.DirectionTaps:
    return geometry.layer_taps(geometry.directions([angle]), kernel_size).runs[0]


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


def test_learned_kernels(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(OrientedConv1d(16, 7), nn.ReLU(), OrientedConv1d(16, 5, layer_offset=0.5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[1, 0, 0] = torch.arange(-3.0, 4.0)
    sheets = []
    grid = draw._grid
    monkeypatch.setattr(draw, "_grid", lambda ax, image, *rest: (sheets.append(image), grid(ax, image, *rest)))
    draw.draw_kernels(model, tmp_path / "kernels.png", kernels_per_direction=1)
    assert (tmp_path / "kernels.png").stat().st_size > 2000
    assert len(sheets) == 16
    np.testing.assert_allclose(sheets[0][3], np.arange(-3, 4) / 3)  # channel 1, at 0 degrees


def test_a_model_without_oriented_layers() -> None:
    with pytest.raises(ValueError, match="model: expected a network with oriented layers, got Linear"):
        draw.draw_kernels(nn.Linear(2, 2), "never.png")
