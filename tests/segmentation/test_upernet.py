import pytest
import timm
import torch

from oriented1d.models import load_dense_checkpoint
from oriented1d.models.features import create_backbone
from oriented1d.segmentation import UPerNet
from oriented1d.segmentation.upernet import FCNHead, UPerHead, pixel_loss
from oriented1d.training.errors import UserError

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "stem_dim": 8}


@pytest.fixture
def heads(golden: dict) -> torch.nn.ModuleDict:
    heads = torch.nn.ModuleDict(
        {"decode_head": UPerHead([16, 32, 48, 64], 6, channels=32), "auxiliary_head": FCNHead(48, 6, channels=16)}
    )
    heads.load_state_dict(golden["state_dict"])  # every key, no more
    return heads.eval()


def test_logits_are_those_of_mmsegmentation(golden: dict, heads: torch.nn.ModuleDict) -> None:
    for case in (golden, golden["odd"]):
        torch.testing.assert_close(heads["decode_head"](case["feats"]), case["decode_logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(heads["auxiliary_head"](case["feats"][2]), case["aux_logits"], rtol=0, atol=1e-5)


def test_losses_and_gradients_are_those_of_mmsegmentation(golden: dict, heads: torch.nn.ModuleDict) -> None:
    features = [x.clone().requires_grad_() for x in golden["feats"]]
    decode = pixel_loss(heads["decode_head"](features), golden["label"])
    auxiliary = 0.4 * pixel_loss(heads["auxiliary_head"](features[2]), golden["label"])
    assert decode.item() == pytest.approx(golden["losses"]["decode.loss_ce"].item(), abs=1e-5)
    assert auxiliary.item() == pytest.approx(golden["losses"]["aux.loss_ce"].item(), abs=1e-5)
    assert (golden["label"] == 255).any()
    (decode + auxiliary).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(golden["grad_norm"][name], rel=1e-4), name
    for x, norm in zip(features, golden["feat_grad_norm"], strict=True):
        assert x.grad is not None
        assert x.grad.norm().item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", ["convnext_atto_1d", "convnext_atto_1dpp", "convnext_atto_2d", "convnext_atto_2dpp"])
def test_any_of_our_backbones(name: str) -> None:
    torch.manual_seed(0)
    arguments = dict(SMALL) if "1d" in name.rpartition("_")[2] else {k: v for k, v in SMALL.items() if k != "stem_dim"}
    model = UPerNet(name, arguments, num_classes=5, drop_path_rate=0.0, channels=16, auxiliary_channels=8)
    assert "backbone.norm3.weight" in model.state_dict()
    images = torch.randn(2, 3, 64, 96)
    assert model(images).shape == (2, 5, 16, 24)
    labels = torch.randint(0, 5, (2, 64, 96))
    decode, auxiliary = model.losses(images, labels)
    assert decode.item() == pytest.approx(1.6, abs=0.3)  # log(5), classifiers start near zero
    assert auxiliary.item() == pytest.approx(0.4 * 1.6, abs=0.12)
    (decode + auxiliary).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_any_timm_backbone() -> None:
    model = UPerNet("resnet18", {"out_indices": (1, 2, 3, 4)}, num_classes=3, channels=16, drop_path_rate=0.0).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"model\.network: expected a backbone with four feature maps, resnet18 has 5"):
        UPerNet("resnet18", num_classes=3, drop_path_rate=0.0)
    with pytest.raises(UserError, match=r"model\.network: cannot make a backbone of no_such_network"):
        create_backbone("no_such_network", 0.0)


def test_ignored_pixels_count_in_the_divisor() -> None:
    logits, labels = torch.randn(1, 4, 6, 6), torch.randint(0, 4, (1, 6, 6))
    labels[0, :3] = 255
    kept = torch.nn.functional.cross_entropy(logits[..., 3:, :], labels[:, 3:])
    assert pixel_loss(logits, labels).item() == pytest.approx(kept.item() / 2)


def test_checkpoints(tmp_path) -> None:
    """A file of mmsegmentation, a checkpoint of ours, a classifier: what is in them arrives."""
    arguments = (SMALL, 4, 0.0, 16, 8)
    source, target = (UPerNet("convnext_atto_1d", *arguments) for _ in range(2))
    weights = source.state_dict()
    wrapped = {key.replace("dwconv.", "dwconv.conv."): value for key, value in weights.items()}
    assert sum(".dwconv.conv." in key for key in wrapped) == 12
    torch.save({"state_dict": wrapped, "meta": {}}, tmp_path / "mmseg.pth")
    lightning = {f"model.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": lightning, "pytorch-lightning_version": "2.6.6"}, tmp_path / "ours.ckpt")
    for name in ("mmseg.pth", "ours.ckpt"):
        torch.nn.init.zeros_(target.decode_head.conv_seg.weight)
        torch.nn.init.zeros_(target.backbone.stages[0][0].dwconv.weight)
        assert load_dense_checkpoint(target, tmp_path / name) == []
        for key, value in target.state_dict().items():
            assert torch.equal(value, weights[key]), key

    classifier = timm.create_model("convnext_atto_1d", num_classes=7, **SMALL)
    torch.save({"model": classifier.state_dict()}, tmp_path / "official.pth")
    lines = load_dense_checkpoint(target, tmp_path / "official.pth")
    assert any("cropped from 31 to 13 taps" in line for line in lines)
    kernel = classifier.state_dict()["stages.3.0.dwconv.weight"]
    assert torch.equal(target.backbone.stages[3][0].dwconv.weight, kernel[..., 9:22])
    assert torch.equal(target.decode_head.conv_seg.weight, weights["decode_head.conv_seg.weight"])

    other = UPerNet("convnext_atto_1d", SMALL, 5, 0.0, 16, 8)
    with pytest.raises(ValueError, match=r"mmseg\.pth.*of another shape: decode_head\.conv_seg\.weight"):
        load_dense_checkpoint(other, tmp_path / "mmseg.pth")
