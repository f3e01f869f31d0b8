import pytest
import torch

from oriented1d.detection.boxes import Matcher, clip, decode, encode, giou, grid_anchors, overlaps, sample
from oriented1d.detection.cascade import CascadeMaskRCNN, Settings, Truth, head_losses, paste, plain, pool
from oriented1d.models import load_dense_checkpoint

EVERYTHING = Settings(10**6, 4 * 10**6, (300, 200), (200, 100))  # samplers keep all, as in the goldens
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "stem_dim": 8}


def sizes_of(golden: dict) -> list[tuple[int, int]]:
    return [tuple(size) for size in golden["img_shapes"]]


def test_box_coder(golden: dict) -> None:
    for case in golden["unit_cases"]["box_coder"]:
        x, y, *sides = case["stds"]
        assert x == y
        assert sides[0] == sides[1]
        stds = x, sides[0]
        decoded = decode(case["boxes"], case["deltas"], stds)
        torch.testing.assert_close(decoded, case["decoded"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(clip(decoded, (70, 90)), case["decoded_clipped_to_hw_70_90"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(encode(case["boxes"], case["targets"], stds), case["encoded"])


def test_matcher(golden: dict) -> None:
    for case in golden["unit_cases"]["assigner"]:
        config = case["config"]
        lowest = config["min_pos_iou"] if config["match_low_quality"] else None
        matcher = Matcher(config["pos_iou_thr"], config["neg_iou_thr"], lowest)
        assert torch.equal(matcher(case["boxes"], case["gt_boxes"]), case["assigned_gt_index"]), case["name"]
        assert torch.equal(matcher(case["boxes"], case["gt_boxes"][:0]), case["assigned_without_gt"]), case["name"]


def test_pyramid_anchors_and_proposals(golden: dict, heads: torch.nn.ModuleDict) -> None:
    maps = heads["neck"](golden["feats"])
    for ours, theirs in zip(maps, golden["fpn"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    outputs = heads["rpn_head"](maps)
    for i, theirs in enumerate(golden["intermediate"]["base_anchors"]):
        torch.testing.assert_close(grid_anchors((1, 1), 4 * 2**i, theirs.device), theirs)
    assert outputs[2][0][3 * 32 + 3].tolist() == (outputs[2][0][0] + torch.tensor([4.0, 4.0, 4.0, 4.0])).tolist()
    proposals = heads["rpn_head"].proposals(outputs, sizes_of(golden), (200, 100))
    for (boxes, scores), theirs in zip(proposals, golden["proposals"], strict=True):
        torch.testing.assert_close(boxes, theirs["boxes"], rtol=0, atol=3e-5)
        torch.testing.assert_close(scores, theirs["scores"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling(golden: dict, memory_format: torch.memory_format) -> None:
    case = golden["roi_extractor_case"]
    image = case["rois"][:, 0]
    boxes = [case["rois"][image == i][:, 1:] for i in range(2)]
    order = torch.cat([(image == i).nonzero().flatten() for i in range(2)])
    maps = [x.contiguous(memory_format=memory_format) for x in golden["fpn"]]
    torch.testing.assert_close(pool(plain(maps), boxes, 7), case["out7"][order], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        pool(plain(maps), boxes, 14)[:, :8], case["out14_channels_0_to_7"][order], rtol=0, atol=1e-6
    )


def test_losses_and_gradients(golden: dict, heads: torch.nn.ModuleDict) -> None:
    features = [x.clone().requires_grad_() for x in golden["feats"]]
    truths = [Truth(truth["boxes"], truth["labels"], truth["masks"]) for truth in golden["gt"]]
    losses = head_losses(
        heads["rpn_head"], heads["roi_head"], heads["neck"](features), sizes_of(golden), truths, EVERYTHING
    )
    assert len(losses) == 11
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden["losses"][name].sum().item(), abs=1e-5), name
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert norm == pytest.approx(golden["grad_norm"][name], rel=1e-3, abs=1e-5), name
    for x, norm in zip(features, golden["feat_grad_norm"], strict=True):
        assert x.grad is not None
        assert x.grad.norm().item() == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("rescaled", [False, True])
def test_detections(golden: dict, heads: torch.nn.ModuleDict, rescaled: bool) -> None:
    maps = heads["neck"](golden["feats"])
    sizes = sizes_of(golden)
    proposals = heads["rpn_head"].proposals(heads["rpn_head"](maps), sizes, (200, 100))
    scales = torch.tensor(golden["scale_factors"]) if rescaled else torch.ones(2, 2)
    found = heads["roi_head"].detect(maps, [boxes for boxes, _ in proposals], sizes, scales, EVERYTHING)
    expected = golden["detections_rescaled" if rescaled else "detections"]
    for ours, theirs, size in zip(found, expected, golden["ori_shapes"] if rescaled else sizes, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        # Pixels. Sums depend on the number of threads: 1.6e-4 with one.
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=0, atol=3e-4)
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=2e-5)
        number = len(theirs["masks"])
        masks = paste(ours.masks[:number], ours.boxes[:number], tuple(size))
        assert int((masks != theirs["masks"]).sum()) <= 2  # of pixels at the threshold; 0 with two threads
        if "mask_probs" in theirs:
            torch.testing.assert_close(ours.masks[:60], theirs["mask_probs"], rtol=0, atol=2e-5)


def test_boxes_by_hand() -> None:
    a, b = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30]])
    torch.testing.assert_close(overlaps(a, b), torch.tensor([[1 / 3, 0.0]]))
    torch.testing.assert_close(giou(a.repeat(2, 1), b), torch.tensor([1 / 3, -700 / 900]))
    steps = encode(a.repeat(2, 1), b)
    torch.testing.assert_close(decode(a.repeat(2, 1), steps), b)


def test_sampling() -> None:
    matches = torch.tensor([0] * 50 + [-1] * 500 + [-2] * 50)
    ((positives, negatives),) = sample([matches], 100, 0.25)
    assert (len(positives), len(negatives)) == (25, 75)
    assert (matches[positives] == 0).all()
    assert (matches[negatives] == -1).all()
    assert len(set(positives.tolist())) == 25
    ((positives, negatives),) = sample([matches], 1000, 0.25)
    assert (len(positives), len(negatives)) == (50, 500)
    assert torch.equal(torch.cat([positives, negatives]), torch.arange(550))
    several = sample([matches, matches[:0], -torch.ones(9, dtype=torch.int64), matches], 100, 0.25)
    assert [(len(positives), len(negatives)) for positives, negatives in several] == [
        (25, 75),
        (0, 0),
        (0, 9),
        (25, 75),
    ]
    assert not torch.equal(several[0][0], several[3][0])


def test_boxes_that_are_not_allowed_match_nothing_and_hide_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [0, 0, 9, 4]])
    truths = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9.5]])
    matcher = Matcher(0.9, 0.3, 0.3)
    assert matcher(boxes, truths).tolist() == [1, -2, -1, -2]
    # The second box is now the one that overlaps either truth most; the last of them counts.
    assert matcher(boxes, truths, torch.tensor([False, True, True, True])).tolist() == [-2, 1, -1, -2]
    assert matcher(boxes, truths[:0], torch.tensor([False, True, True, True])).tolist() == [-2, -1, -1, -1]


def model_and_batch() -> tuple[CascadeMaskRCNN, torch.Tensor, list, list[Truth]]:
    torch.manual_seed(0)
    model = CascadeMaskRCNN("convnext_atto_1d", SMALL, 3, 0.0, 16, 32, Settings(64, 64, (100, 50), (100, 50)))
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[0, 20:60, 20:80] = masks[1, 50:90, 60:100] = 1
    boxes = torch.tensor([[20.0, 20, 80, 60], [60, 50, 100, 90]])
    truths = [
        Truth(boxes, torch.tensor([0, 2]), masks),
        Truth(boxes[:0], torch.zeros(0, dtype=torch.int64), masks[:0]),
    ]
    return model, torch.randn(2, 3, 96, 128), [(96, 128), (90, 100)], truths


def test_whole_network_trains_also_on_images_without_objects() -> None:
    model, images, sizes, truths = model_and_batch()
    losses = model.losses(images, sizes, truths)
    assert len(losses) == 11
    assert losses["loss_rpn_cls"].item() == pytest.approx(0.69, abs=0.05)
    assert losses["s0.loss_cls"].item() == pytest.approx(1.386, abs=0.1)  # log(4), classifiers start near zero
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    empty = model.losses(images, sizes, [truths[1], truths[1]])
    assert all(loss.isfinite() for loss in empty.values())
    assert empty["s1.loss_mask"].item() == 0
    sum(empty.values()).backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP waits for all of them
    with torch.no_grad():
        for found in model.eval()(images, sizes, torch.ones(2, 2)):
            assert (found.scores > 0.05).all()
            assert len(found.boxes) == len(found.labels) == len(found.masks) <= 100


def test_a_file_of_mmdetection(tmp_path) -> None:
    source, target = model_and_batch()[0], model_and_batch()[0]
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    weights = source.state_dict()
    assert {key.split(".")[0] for key in weights} == {"backbone", "neck", "rpn_head", "roi_head"}
    wrapped = {key.replace("dwconv.", "dwconv.conv."): value for key, value in weights.items()}
    torch.save({"state_dict": wrapped, "meta": {}}, tmp_path / "mmdet.pth")
    assert load_dense_checkpoint(target, tmp_path / "mmdet.pth") == []
    for key, value in target.state_dict().items():
        assert torch.equal(value, weights[key]), key
