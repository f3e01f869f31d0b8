import math
import re

import numpy as np
import pytest
import torch

from oriented1d import geometry
from tests.operator import reference


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 15, 31, 63])
def test_taps_of_the_networks_angles_follow_the_definition(step: int, kernel_size: int) -> None:
    angle = np.float32(np.pi * step / 8)
    assert geometry.kernel_taps(angle, kernel_size).tolist() == [list(t) for t in reference.taps(angle, kernel_size)]


def test_distinct_pixels_of_31_taps() -> None:
    counts = [len(np.unique(geometry.kernel_taps(math.pi * n / 8, 31), axis=0)) for n in range(8)]
    assert counts == [31, 29, 21, 29, 31, 29, 21, 29]


def test_ninety_degrees_reaches_the_last_row() -> None:
    taps = geometry.kernel_taps(math.pi / 2, 31)
    assert taps[:, 0].tolist() == list(range(15, -16, -1))
    assert not taps[:, 1].any()


@pytest.mark.parametrize("kernel_size", [31, 63, 127])
def test_products_that_are_integers_but_for_rounding_are_not_truncated(kernel_size: int) -> None:
    r = kernel_size // 2
    t = np.arange(-r, r + 1)
    half = np.sign(t) * (abs(t) // 2)
    assert geometry.kernel_taps(math.pi / 6, kernel_size)[:, 0].tolist() == (-half).tolist()
    assert geometry.kernel_taps(math.pi / 3, kernel_size)[:, 1].tolist() == half.tolist()
    assert geometry.kernel_taps(2 * math.pi / 3, kernel_size)[:, 1].tolist() == (-half).tolist()


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.5, -0.7, 4.0])
def test_taps_are_symmetric_about_the_centre(angle: float) -> None:
    taps = geometry.kernel_taps(angle, 31)
    assert taps[15].tolist() == [0, 0]
    assert (taps == -taps[::-1]).all()
    assert abs(taps).max() > 5


@pytest.mark.parametrize(("channels", "num_directions"), [(8, 8), (96, 8), (12, 8), (3, 8), (40, 7), (5, 1)])
def test_channels_are_shared_out_in_order(channels: int, num_directions: int) -> None:
    angles = geometry.layer_angles(channels, num_directions)
    expected = [math.pi * ((num_directions * (c + 1) - 1) // channels) / num_directions for c in range(channels)]
    np.testing.assert_allclose(angles.numpy(), np.float32(expected), rtol=1e-7)


def test_layer_offset_turns_by_half_turns_and_wraps() -> None:
    angles = geometry.layer_angles(8, 8, 0.5)
    np.testing.assert_allclose(angles.numpy() / math.pi * 8, [4, 5, 6, 7, 0, 1, 2, 3], rtol=1e-6, atol=1e-6)


def test_angles_match_the_original_networks(goldens) -> None:
    networks = torch.load(goldens / "networks.pt", weights_only=True)
    seen = 0
    for network in networks.values():
        for name, theta in network["model"].items():
            if name.endswith("theta"):
                ours = [geometry.layer_angles(len(theta), 8, offset) for offset in (0.0, 0.5)]
                assert any(torch.equal(theta.flatten(), angles) for angles in ours), name
                seen += 1
    assert seen > 20


def test_directions_are_runs() -> None:
    layer = geometry.directions([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert (layer.angles, layer.counts, layer.channels) == ((0.0, 1.0, 0.0), (2, 3, 1), 6)
    assert layer.per_channel().tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert geometry.directions(torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.float64)) == layer
    assert geometry.directions(torch.tensor([[0, 9], [0, 9], [1, 9], [1, 9], [1, 9], [0, 9]]).float()[:, 0]) == layer


def test_directions_are_a_text() -> None:
    layer = geometry.directions([0.0, 0.0, 1.5, -1.5])
    assert layer.text == "2@0.0 1@1.5 1@-1.5"
    for angles in (geometry.layer_angles(96, 8, 0.5), torch.randn(50), torch.randn(8) * 1e-30, torch.zeros(0)):
        layer = geometry.directions(angles)
        assert geometry.parse(layer.text) == layer
        assert torch.equal(geometry.parse(layer.text).per_channel(), angles)
    assert geometry.parse(layer.text) is geometry.parse(layer.text)
    assert geometry.Directions((np.float64(0.5),), (3,)).text == "3@0.5"


@pytest.mark.parametrize(
    "word", ["12", "12@", "@0.5", "1.5@0.5", "12@x", "12@0.5@1", "-4@0.0", "0@0.0", "8@nan", "8@inf", "8@1e99999"]
)
def test_a_text_that_is_none_of_directions(word: str) -> None:
    message = re.escape(f"angles: expected words such as 12@0.5 (channels, radians), got {word!r}")
    with pytest.raises(ValueError, match=message):
        geometry.parse(f"4@0.0 {word}")


def test_changed_angles_are_read_again() -> None:
    angles = torch.zeros(4)
    assert geometry.directions(angles).angles == (0.0,)
    angles[2] = 1.0
    assert geometry.directions(angles).angles == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("angles", "error", "words"),
    [
        (torch.tensor([0.0, math.nan]), ValueError, "finite.*nan.*channel 1"),
        ([0.0, math.inf], ValueError, "finite"),
        (torch.zeros(2, 2), ValueError, r"shape \(C,\).*\(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "int64"),
        ("abc", TypeError, "real numbers"),
        (0.5, ValueError, "shape"),
    ],
)
def test_bad_angles_are_named(angles: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"angles: .*{words}"):
        geometry.directions(angles)  # type: ignore[arg-type]


def test_folding_keeps_every_tap() -> None:
    for run in geometry.layer_taps(geometry.directions(geometry.layer_angles(16)), 31).runs:
        assert run.distinct[run.fold].tolist() == run.offsets.tolist()
        assert len(np.unique(run.distinct, axis=0)) == len(run.distinct)
        assert run.stop - run.start == 2
