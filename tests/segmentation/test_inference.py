import pytest
import torch
from torch.nn import functional as F

from oriented1d.segmentation import inference
from oriented1d.segmentation.metrics import SegmentationScores
from oriented1d.segmentation.upernet import resize
from oriented1d.training.images import resize_image, scaled_size

MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@pytest.fixture
def case(golden: dict) -> dict:
    return golden["inference"]


@pytest.fixture
def network(case: dict) -> inference.Network:
    return lambda x: F.conv2d(x, case["weight"], case["bias"], stride=4, padding=1)


def normalised(image: torch.Tensor) -> torch.Tensor:
    return ((image.float() - MEAN) / STD).permute(2, 0, 1)[None]


def slide(network: inference.Network, image: torch.Tensor) -> torch.Tensor:
    return inference.slide(network, image, window=64, stride=42)


def test_whole(case: dict, network: inference.Network) -> None:
    logits = inference.whole(network, case["input"][None])
    torch.testing.assert_close(logits[0], case["whole"]["logits"], rtol=0, atol=1e-5)
    assert torch.equal(inference.most_likely(logits, (100, 140)), case["whole"]["pred"].long())
    smaller = case["whole_to_ori_75x110"]
    torch.testing.assert_close(resize(logits, (75, 110))[0], smaller["logits"], rtol=0, atol=1e-5)
    assert torch.equal(inference.most_likely(logits, (75, 110)), smaller["pred"].long())


def test_slide(case: dict, network: inference.Network) -> None:
    logits = slide(network, case["input"][None])
    torch.testing.assert_close(logits[0], case["slide"]["logits"], rtol=0, atol=1e-5)
    small = slide(network, normalised(case["scaled_images_u8_rgb"][0]))
    torch.testing.assert_close(small[0], case["slide_small_image_50x70"]["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "infer"), [("whole", inference.whole), ("slide", slide)])
def test_multi_scale(case: dict, network: inference.Network, name: str, infer, monkeypatch) -> None:
    images = [normalised(image) for image in case["scaled_images_u8_rgb"]]
    expected = case[f"multi_scale_flip_{name}"]
    result = inference.probabilities(network, images, (100, 140), infer)
    torch.testing.assert_close(result, expected["probs"], rtol=0, atol=1e-5)
    assert torch.equal(result.argmax(0), expected["pred"].long())
    monkeypatch.setattr(inference, "_NUMBERS_AT_ONCE", 2 * 100 * 140)  # two classes at a time
    torch.testing.assert_close(inference.probabilities(network, images, (100, 140), infer), result, rtol=0, atol=1e-6)


def test_most_likely_does_not_depend_on_how_many_classes_are_resized_at_once(monkeypatch) -> None:
    logits = torch.randn(1, 11, 9, 7)
    logits[:, 4] = logits[:, 2]  # the first of equals wins
    expected = resize(logits, (30, 33))[0].argmax(0)
    for at_once in (1, 3, 100):
        monkeypatch.setattr(inference, "_NUMBERS_AT_ONCE", at_once * 30 * 33)
        assert torch.equal(inference.most_likely(logits, (30, 33)), expected)


def test_images_are_scaled_as_by_opencv(case: dict) -> None:
    image = case["image_u8_rgb"].numpy()
    for ratio, expected in zip((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), case["scaled_images_u8_rgb"], strict=True):
        size = scaled_size(100, 140, int(560 * ratio), int(100 * ratio))
        assert size == tuple(expected.shape[:2])
        difference = resize_image(image, *size).astype(int) - expected.numpy().astype(int)
        assert abs(difference).max() <= 1


def test_scores(golden: dict) -> None:
    case = golden["metric"]
    scores = SegmentationScores(case["num_classes"])
    for prediction, labels in zip(case["pred"], case["reduced_label"], strict=True):
        scores.update(prediction, labels)
    result, expected = scores.compute(), case["expected_reduce_zero_label"]
    torch.testing.assert_close(result["iou"].float(), expected["IoU"], equal_nan=True)
    torch.testing.assert_close(result["accuracy"].float(), expected["Acc"], equal_nan=True)
    assert result["miou"].item() == pytest.approx(expected["mIoU"], abs=1e-6)
    assert result["mean_accuracy"].item() == pytest.approx(expected["mAcc"], abs=1e-6)
    assert result["pixel_accuracy"].item() == pytest.approx(expected["aAcc"], abs=1e-6)
    scores.reset()
    scores.update(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert scores.confusion.sum() == 0


def test_windows() -> None:
    # A window that covers everything is the whole; two windows overlap where they must.
    network = lambda x: x.mean(1, keepdim=True).repeat(1, 3, 1, 1)  # noqa: E731
    image = torch.randn(1, 3, 20, 45)
    torch.testing.assert_close(slide(network, image), inference.whole(network, image))
    assert inference._corners(100, 64, 42) == [0, 36]
    assert inference._corners(50, 64, 42) == [0]
    assert inference._corners(170, 64, 42) == [0, 42, 84, 106]
