import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oriented1d import layers
from oriented1d.detection import cascade
from oriented1d.detection.boxes import Matcher, clip, decode, encode, giou, grid_anchors, overlaps, sample
from oriented1d.detection.cascade import (
    CascadeMaskRCNN,
    Settings,
    Truth,
    Truths,
    head_losses,
    paste,
    plain,
    pool,
    sides_of,
)
from oriented1d.models import load_dense_checkpoint

EVERYTHING = Settings(10**6, 4 * 10**6, (300, 200), (200, 100))  # samplers keep all, as in the goldens
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "stem_dim": 8}


def sizes_of(golden: dict) -> list[tuple[int, int]]:
    return [tuple(size) for size in golden["img_shapes"]]


def truths_of(golden: dict) -> list[Truth]:
    return [Truth(truth["boxes"], truth["labels"], truth["masks"]) for truth in golden["gt"]]


def test_box_coder(golden: dict) -> None:
    for case in golden["unit_cases"]["box_coder"]:
        x, y, *sides = case["stds"]
        assert x == y
        assert sides[0] == sides[1]
        stds = x, sides[0]
        decoded = decode(case["boxes"], case["deltas"], stds)
        torch.testing.assert_close(decoded, case["decoded"], rtol=1e-6, atol=1e-5)
        clipped = clip(decoded, torch.tensor([90.0, 70.0]))
        torch.testing.assert_close(clipped, case["decoded_clipped_to_hw_70_90"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(encode(case["boxes"], case["targets"], stds), case["encoded"])


def test_matcher(golden: dict) -> None:
    for case in golden["unit_cases"]["assigner"]:
        config = case["config"]
        lowest = config["min_pos_iou"] if config["match_low_quality"] else None
        matcher = Matcher(config["pos_iou_thr"], config["neg_iou_thr"], lowest)
        boxes, truths = case["boxes"], case["gt_boxes"]
        exist = torch.ones(len(truths), dtype=torch.bool)
        assert torch.equal(matcher(boxes, truths, exist), case["assigned_gt_index"]), case["name"]
        assert torch.equal(matcher(boxes, truths, ~exist), case["assigned_without_gt"]), case["name"]
        # Both as sets of one batch, with padding that would match boxes, were it not left out.
        padded = torch.cat([truths, boxes]).expand(2, -1, -1)
        both = torch.zeros(padded.shape[:2], dtype=torch.bool)
        both[0, : len(truths)] = True
        expected = torch.stack([case["assigned_gt_index"], case["assigned_without_gt"]])
        assert torch.equal(matcher(boxes, padded, both), expected), case["name"]
        if lowest is None:  # nothing but the box itself counts: each box may be a set of its own
            of_each = truths.expand(len(boxes), -1, -1), exist.expand(len(boxes), -1)
            assert torch.equal(matcher(boxes[:, None], *of_each)[:, 0], case["assigned_gt_index"]), case["name"]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def features(request: pytest.FixtureRequest, golden: dict, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Feature maps of the goldens. On a GPU they are channels_last, 1x1 layers are products of matrices, boxes are
    filled up to a multiple of 32, and sides of maps to one of 16."""
    if request.param == "as on a CPU":
        return golden["feats"]
    monkeypatch.setattr(cascade, "ROWS", {"cpu": 32})
    monkeypatch.setattr(cascade, "SIDES", {"cpu": 16})
    monkeypatch.setattr(layers, "_cudnn_in_16_bits", lambda input: True)
    return [x.contiguous(memory_format=torch.channels_last) for x in golden["feats"]]


def slack(features: list[torch.Tensor]) -> float:
    """Factor of tolerances: in channels_last sums have another order than those of the goldens."""
    return 1 if features[0].is_contiguous() else 3


def test_pyramid_anchors_and_proposals(golden: dict, heads: torch.nn.ModuleDict, features: list[torch.Tensor]) -> None:
    maps = heads["neck"](features)
    for ours, theirs in zip(maps, golden["fpn"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    outputs = heads["rpn_head"](maps)
    for i, theirs in enumerate(golden["intermediate"]["base_anchors"]):
        torch.testing.assert_close(grid_anchors((1, 1), 4 * 2**i, theirs.device), theirs)
    anchors, parts = outputs[2:]
    assert anchors[3 * 32 + 3].tolist() == (anchors[0] + torch.tensor([4.0, 4.0, 4.0, 4.0])).tolist()
    assert parts == [3 * x.shape[2] * x.shape[3] for x in maps]
    sides = sides_of(sizes_of(golden), anchors.device)
    rois, scores = heads["rpn_head"].proposals(outputs, sides, (200, 100))
    assert rois[:, 0].tolist() == [i for i, theirs in enumerate(golden["proposals"]) for _ in theirs["scores"]]
    for name, ours, tolerance in (("boxes", rois[:, 1:], 3e-5), ("scores", scores, 1e-6)):
        theirs = torch.cat([theirs[name] for theirs in golden["proposals"]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=slack(features) * tolerance)


def test_proposals_without_area_are_left_out_and_take_no_place() -> None:
    """The surest of ten anchors of one map lie on the border of the image; there is room for three of the others."""
    anchors = torch.tensor([[20.0 * i, 20, 20.0 * i + 15, 35] for i in range(10)])
    logits = torch.arange(10.0, 0, -1)[None].repeat(2, 1)
    steps = torch.zeros(2, 10, 4)
    steps[:, :4, 0] = 100  # far to the right
    sides = torch.tensor([[200.0, 50], [130, 50]])
    rpn = cascade.RPNHead(8)
    rois, scores = rpn.proposals((logits, steps, anchors, [6, 4]), sides, (10, 3))
    # In the second image anchor 6 is cut, and those behind are outside.
    assert rois[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.cat([anchors[4:7], anchors[4:7].minimum(torch.tensor([130.0, 50, 130, 50]))])
    torch.testing.assert_close(rois[:, 1:], expected)
    torch.testing.assert_close(scores, logits[0, 4:7].repeat(2).sigmoid())
    # One more would need an anchor that is outside.
    assert len(rpn.proposals((logits, steps, anchors, [6, 4]), sides, (10, 4))[0]) == 4 + 3


def test_proposals_suppress_those_of_their_own_level() -> None:
    anchors = torch.tensor([[10.0, 10, 40, 40], [10, 10, 40, 41], [10, 10, 40, 40], [10, 10, 40, 41]])
    logits, steps = torch.tensor([[0.5, 0.7, 0.8, 0.6]]), torch.zeros(1, 4, 4)
    rois, scores = cascade.RPNHead(8).proposals((logits, steps, anchors, [2, 2]), torch.tensor([[60.0, 60]]), (2, 9))
    assert torch.equal(rois[:, 1:], anchors[[2, 1]])
    torch.testing.assert_close(scores, torch.tensor([0.8, 0.7]).sigmoid())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling(golden: dict, memory_format: torch.memory_format) -> None:
    case = golden["roi_extractor_case"]
    maps = plain([x.contiguous(memory_format=memory_format) for x in golden["fpn"]])
    torch.testing.assert_close(pool(maps, case["rois"], 7), case["out7"], rtol=0, atol=1e-6)
    fourteen = pool(maps, case["rois"], 14)[:, :8]
    torch.testing.assert_close(fourteen, case["out14_channels_0_to_7"], rtol=0, atol=1e-6)


def test_truths_of_several_images() -> None:
    boxes = torch.arange(12.0).view(3, 4)
    masks = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    labels = torch.tensor([5, 6, 7])
    parts = [Truth(boxes[:1], labels[:1], masks[:1]), Truth(boxes[:0], labels[:0], masks[:0])]
    truths = Truths.of([*parts, Truth(boxes[1:], labels[1:], masks[1:])])
    assert torch.equal(truths.rois, torch.cat([torch.tensor([[0.0], [2], [2]]), boxes], 1))
    assert torch.equal(truths.labels, labels)
    assert torch.equal(truths.masks, masks)
    assert truths.exist.tolist() == [[True, False], [False, False], [True, True]]
    assert torch.equal(truths.boxes[truths.exist], boxes)
    assert not truths.boxes[~truths.exist].any()
    for image, place in truths.exist.nonzero().tolist():
        assert torch.equal(truths.boxes[image, place], truths.rois[truths.first[image] + place, 1:])
    none = Truths.of([parts[1], parts[1]])
    assert (none.rois.shape, none.boxes.shape, none.exist.tolist()) == ((0, 5), (2, 1, 4), [[False], [False]])


@pytest.mark.parametrize("largest", [cascade.LARGEST_TABLE, 1])
def test_losses_and_gradients(
    golden: dict,
    heads: torch.nn.ModuleDict,
    features: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    largest: int,
) -> None:
    """With all images matched at once, and one after the other."""
    monkeypatch.setattr(cascade, "LARGEST_TABLE", largest)
    features = [x.clone().requires_grad_() for x in features]
    losses = head_losses(
        heads["rpn_head"],
        heads["roi_head"],
        heads["neck"](features),
        sizes_of(golden),
        truths_of(golden),
        EVERYTHING,
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
def test_detections(golden: dict, heads: torch.nn.ModuleDict, features: list[torch.Tensor], rescaled: bool) -> None:
    maps = heads["neck"](features)
    sizes = sizes_of(golden)
    sides = sides_of(sizes, maps[0].device)
    rois, _ = heads["rpn_head"].proposals(heads["rpn_head"](maps), sides, (200, 100))
    scales = torch.tensor(golden["scale_factors"]) if rescaled else torch.ones(2, 2)
    found = heads["roi_head"].detect(maps, rois, sides, scales, EVERYTHING)
    expected = golden["detections_rescaled" if rescaled else "detections"]
    for ours, theirs, size in zip(found, expected, golden["ori_shapes"] if rescaled else sizes, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        # Pixels. Sums depend on the number of threads: 1.6e-4 with one.
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=0, atol=slack(features) * 3e-4)
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=slack(features) * 2e-5)
        number = len(theirs["masks"])
        masks = paste(ours.masks[:number], ours.boxes[:number], tuple(size))
        assert int((masks != theirs["masks"]).sum()) <= 2  # of pixels at the threshold; 0 with two threads
        if "mask_probs" in theirs:
            torch.testing.assert_close(ours.masks[:60], theirs["mask_probs"], rtol=0, atol=slack(features) * 2e-5)


def test_numbers_of_boxes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads see multiples of 32, the empty boxes change nothing, and no boxes stay none."""
    monkeypatch.setattr(cascade, "ROWS", {"cpu": 32})
    sizes: dict[str, list[int]] = {"BoxHead": [], "MaskHead": []}
    model, images, of_images, truths = model_and_batch()
    for stage in (*model.roi_head.bbox_head, *model.roi_head.mask_head):
        stage.register_forward_hook(lambda module, inputs, _: sizes[type(module).__name__].append(len(inputs[0])))
    losses = model.losses(images, of_images, truths)
    assert all(number % 32 == 0 and number > 0 for number in sizes["MaskHead"])
    monkeypatch.setattr(cascade, "ROWS", {})
    torch.manual_seed(0)
    for numbers in sizes.values():
        numbers.clear()
    model.eval()
    with torch.no_grad():
        few = model(images, of_images, torch.ones(2, 2))
    assert any(number % 32 for number in sizes["BoxHead"] + sizes["MaskHead"])
    monkeypatch.setattr(cascade, "ROWS", {"cpu": 32})
    for numbers in sizes.values():
        numbers.clear()
    with torch.no_grad():
        filled = model(images, of_images, torch.ones(2, 2))
    assert all(number % 32 == 0 for number in sizes["BoxHead"] + sizes["MaskHead"])
    for ours, theirs in zip(filled, few, strict=True):
        for name in ("boxes", "scores", "labels", "masks"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    assert all(loss.isfinite() for loss in losses.values())
    assert cascade.filled_up(torch.zeros(0, 5)).shape == (0, 5)
    boxes = torch.randn(33, 5)
    assert torch.equal(cascade.filled_up(boxes), torch.cat([boxes, torch.zeros(31, 5)]))


def test_sizes_of_maps_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the pyramid see multiples of 16, but for large maps; values, gradients and channels_last stay."""
    layer = torch.nn.Conv2d(8, 8, 3, padding=1).double().to(memory_format=torch.channels_last)
    seen: list[tuple[int, int]] = []
    layer.register_forward_hook(lambda module, inputs, _: seen.append(tuple(inputs[0].shape[2:])))
    every_second = torch.randn(2, 8, 26, 40).contiguous(memory_format=torch.channels_last)[:, :, ::2, ::2]
    sizes = {(13, 20): (16, 32), (16, 32): (16, 32), (1, 192): (16, 192), (17, 193): (17, 193)}
    maps = [torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last) for size in sizes] + [every_second]
    for x in maps:
        leaf = x.double().requires_grad_()
        results = []
        for step in (1, 16):
            monkeypatch.setattr(cascade, "SIDES", {"cpu": step})
            y = cascade.at_few_sizes(layer, leaf)
            results.append([y, *torch.autograd.grad((y.cos() * y).sum(), [leaf, *layer.parameters()])])
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert results[-1][1].is_contiguous(memory_format=torch.channels_last)
        assert seen == [tuple(x.shape[2:]), sizes[tuple(x.shape[2:])]]
        seen.clear()
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_pyramid_has_few_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    neck, rpn = cascade.FPN([8, 8, 8, 8], 8), cascade.RPNHead(8)
    seen: list[tuple[int, int]] = []
    for module in (*(conv.conv for conv in neck.fpn_convs), rpn.rpn_conv):
        module.register_forward_hook(lambda module, inputs, _: seen.append(tuple(inputs[0].shape[2:])))
    features = [torch.randn(1, 8, 25 * 2**i, 36 * 2**i) for i in (3, 2, 1, 0)]
    for step, small in ((1, [(100, 144), (50, 72), (25, 36)]), (16, [(112, 144), (64, 80), (32, 48)])):
        monkeypatch.setattr(cascade, "SIDES", {"cpu": step})
        rpn(neck(features))
        assert seen == [(200, 288), *small, (200, 288), *small, (16, 32) if step == 16 else (13, 18)]
        seen.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rpn(neck(features))
    assert seen[1:4] == [(100, 144), (50, 72), (25, 36)]
    pointwise = [module for module in (*neck.modules(), *rpn.modules()) if getattr(module, "kernel_size", 0) == (1, 1)]
    assert len(pointwise) == 6
    assert all(isinstance(module, layers.PatchConv2d) for module in pointwise)


def test_boxes_by_hand() -> None:
    a, b = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30]])
    torch.testing.assert_close(overlaps(a, b), torch.tensor([[1 / 3, 0.0]]))
    several = overlaps(torch.stack([a, b[:1]]), b)
    torch.testing.assert_close(several, torch.tensor([[[1 / 3, 0.0]], [[1.0, 0.0]]]))
    torch.testing.assert_close(giou(a.repeat(2, 1), b), torch.tensor([1 / 3, -700 / 900]))
    steps = encode(a.repeat(2, 1), b)
    torch.testing.assert_close(decode(a.repeat(2, 1), steps), b)


def test_clipping_by_row() -> None:
    boxes = torch.tensor([[-5.0, -6, 90, 80], [-5, -6, 90, 80], [3, 4, 5, 6]])
    clipped = clip(boxes, torch.tensor([[50.0, 70], [70, 50], [50, 50]]))
    assert clipped.tolist() == [[0, 0, 50, 70], [0, 0, 70, 50], [3, 4, 5, 6]]


def test_sampling() -> None:
    matches = torch.tensor([0] * 50 + [-1] * 500 + [-2] * 50)
    first = torch.zeros(600, dtype=torch.int64)
    chosen, positives, negatives = sample(matches, first, 1, 100, 0.25)
    assert (positives, negatives) == ([25], [75])
    assert (matches[chosen[:25]] == 0).all()
    assert (matches[chosen[25:]] == -1).all()
    assert len(set(chosen.tolist())) == 100
    assert len(set(chosen.tolist()) ^ set(sample(matches, first, 1, 100, 0.25)[0].tolist())) > 0
    chosen, positives, negatives = sample(matches, first, 1, 1000, 0.25)
    assert (positives, negatives) == ([50], [500])
    assert torch.equal(chosen.sort().values, torch.arange(550))
    assert (matches[chosen[:50]] == 0).all()


def test_sampling_of_several_images() -> None:
    matches = torch.tensor([0] * 50 + [-1] * 500 + [-2] * 50)
    several = torch.cat([matches, -torch.ones(9, dtype=torch.int64), matches])
    image = torch.tensor([0] * 600 + [2] * 9 + [3] * 600)  # the second has nothing
    mixed = torch.randperm(len(several))
    several, image = several[mixed], image[mixed]
    chosen, positives, negatives = sample(several, image, 4, 100, 0.25)
    assert (positives, negatives) == ([25, 0, 0, 25], [75, 0, 9, 75])
    assert image[chosen].tolist() == [0] * 25 + [3] * 25 + [0] * 75 + [2] * 9 + [3] * 75
    assert several[chosen].tolist() == [0] * 50 + [-1] * 159
    assert len(set(chosen.tolist())) == 209
    # The same images as rows.
    rows = torch.stack([matches, matches.flip(0)])
    chosen, *numbers = sample(rows, torch.arange(2)[:, None], 2, 100, 0.25)
    assert numbers == [[25, 25], [75, 75]]
    assert (chosen // 600).tolist() == [0] * 25 + [1] * 25 + [0] * 75 + [1] * 75
    assert rows.flatten()[chosen].tolist() == [0] * 50 + [-1] * 150


def test_every_box_is_sampled_as_often() -> None:
    matches = torch.tensor([[0] * 20 + [-1] * 20 + [-2] * 20]).expand(2, -1)
    counts = torch.zeros(120)
    for _ in range(2000):
        chosen, *_ = sample(matches, torch.arange(2)[:, None], 2, 10, 0.5)
        counts[chosen] += 1
    counts = counts.view(2, 60)
    assert not counts[:, 40:].any()
    assert (counts[:, :40] - 500).abs().max() < 100  # five standard deviations


def test_boxes_that_are_not_allowed_match_nothing_and_hide_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [0, 0, 9, 4]])
    truths = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9.5]])
    exist = torch.tensor([True, True])
    matcher = Matcher(0.9, 0.3, 0.3)
    assert matcher(boxes, truths, exist).tolist() == [1, -2, -1, -2]
    # The second box is now the one that overlaps either truth most; the last of them counts.
    allowed = torch.tensor([False, True, True, True])
    assert matcher(boxes, truths, exist, allowed).tolist() == [-2, 1, -1, -2]
    assert matcher(boxes, truths, ~exist, allowed).tolist() == [-2, -1, -1, -1]


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


class Operations(TorchDispatchMode):
    """Counts operations other than views, and those that wait for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.number, self.waits = 0, collections.Counter()
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> list:
            self.waits["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.number += not function.is_view and name not in ("split", "_unsafe_view")
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if masks or name in ("nms", "nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "_unique2"):
            self.waits[name] += 1
        return function(*arguments, **(options or {}))


def test_operations_and_waits_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few, and hardly more for more images."""
    rpn, roi = cascade.RPNHead(8), cascade.RoIHead(3, 8, 16)
    settings = Settings(64, 64, (100, 50), (100, 50))

    def count(images: int) -> Operations:
        torch.manual_seed(0)
        maps = [torch.randn(images, 8, 96 // stride, 128 // stride, requires_grad=True) for stride in (4, 8, 16, 32)]
        maps.append(maps[-1][:, :, ::2, ::2])
        boxes = torch.tensor([[20.0, 20, 80, 60], [60, 50, 100, 90], [5, 5, 40, 45]])
        truths = [
            Truth(boxes[: i % 4], torch.arange(i % 4) % 3, torch.ones(i % 4, 96, 128, dtype=torch.uint8))
            for i in range(1, images + 1)
        ]
        with Operations(monkeypatch) as operations:
            losses = head_losses(rpn, roi, maps, [(96, 128)] * images, truths, settings)
            torch.stack(list(losses.values())).sum().backward()
        monkeypatch.undo()
        return operations

    count(4)  # the anchors around the origin are made once
    few, many = count(4), count(16)
    assert few.number < 1400
    assert many.number - few.number == 2 * 12  # nms, and where its image begins
    # Sampling waits once (in four places), and so does pooling (twice in three stages).
    assert few.waits == {"tolist": 4 + 6, "nms": 4, "index": 1}
    assert many.waits == {"tolist": 4 + 6, "nms": 16, "index": 1}


def test_ground_truth_that_joined_a_stage_leaves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, sizes, truths = model_and_batch()
    pooled: list[int] = []

    def pool(maps: list[torch.Tensor], rois: torch.Tensor, size: int) -> torch.Tensor:
        pooled.append(len(rois))
        return cascade_pool(maps, rois, size)

    cascade_pool = cascade.pool
    monkeypatch.setattr(cascade, "pool", pool)
    maps = model.neck(model.backbone(images))
    objects, sides = cascade.Truths.of(truths), cascade.sides_of(sizes, images.device)
    model.roi_head.losses(maps, torch.zeros(0, 5), sides, objects, 64)
    # Two objects and nothing else: boxes, then masks of each stage.
    assert pooled == [2] * 6


def test_images_with_few_objects_do_not_pay_for_those_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, sizes, truths = model_and_batch()
    tables: list[int] = []
    matcher = cascade.RPNHead.matcher
    monkeypatch.setattr(cascade, "LARGEST_TABLE", 1)
    monkeypatch.setattr(
        cascade.RPNHead,
        "matcher",
        lambda self, anchors, boxes, *rest: (tables.append(boxes.shape[1]), matcher(anchors, boxes, *rest))[1],
    )
    model.losses(images, sizes, truths)
    assert tables == [2, 1]  # two objects, and the place of one that does not exist


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
