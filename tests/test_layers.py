import copy
import io
import math
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses import FakeTensorMode

from oriented1d import OrientedConv1d, layers, oriented_conv1d
from oriented1d.layers import PatchConv2d
from tests.operator import reference
from tests.operator.reference import relative_error


def expected(layer: OrientedConv1d, x: torch.Tensor) -> torch.Tensor:
    return reference.oriented_conv1d(x, layer.weight, layer.theta, layer.bias, layer.stride, layer.residual)


def turned(layer: OrientedConv1d) -> dict[str, torch.Tensor]:
    return {**layer.state_dict(), "theta": layer.theta + 0.4}


@pytest.mark.parametrize("keywords", [{}, {"stride": 2}, {"bias": False}, {"residual": True}, {"layer_offset": 0.5}])
def test_layer_is_the_operator(keywords: dict) -> None:
    layer = OrientedConv1d(8, 7, **keywords)
    x = torch.randn(2, 8, 9, 10)
    assert relative_error(layer(x), expected(layer, x)) < 1e-6


def test_state_dict_is_that_of_the_original() -> None:
    layer = OrientedConv1d(16, 31)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": (16, 1, 1, 31),
        "bias": (16,),
        "theta": (16,),
    }
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_starts_like_a_depthwise_conv2d_of_its_shape() -> None:
    layer = OrientedConv1d(4096, 31)
    bound = 1 / math.sqrt(31)
    for tensor in (layer.weight, layer.bias):
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_taps_follow_a_loaded_state_dict(column: bool, assign: bool) -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(1, 8, 9, 10)
    before = layer(x).detach()
    state = turned(layer)
    if column:
        state["theta"] = state["theta"][:, None]
    layer.load_state_dict(state, assign=assign)
    assert layer.theta.shape == (8,)
    assert relative_error(layer(x), expected(layer, x)) < 1e-6
    assert relative_error(layer(x), before) > 0.1


def test_taps_follow_a_change_in_place() -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(1, 8, 9, 10)
    layer.theta.add_(0.4)
    assert relative_error(layer(x), expected(layer, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_keeps_the_angles(dtype: torch.dtype) -> None:
    layer = OrientedConv1d(8, 31)
    theta = layer.theta.clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.theta.dtype == torch.float32
    assert torch.equal(layer.theta, theta)
    x = torch.randn(1, 8, 20, 20).to(dtype)
    assert relative_error(layer(x), expected(layer, x)) < 4e-3


def test_meta_then_to_empty_then_load() -> None:
    source = OrientedConv1d(8, 7, layer_offset=0.3)
    with torch.device("meta"):
        layer = OrientedConv1d(8, 7, layer_offset=0.3)
    layer.to_empty(device="cpu")
    assert torch.equal(layer.theta, source.theta)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(1, 8, 9, 10)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_keep_the_taps(how: str) -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(1, 8, 9, 10)
    layer.load_state_dict(turned(layer))
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), layer(x))
    layer.theta.zero_()  # the copy is independent
    assert relative_error(twin(x), layer(x)) > 0.1


def _ddp(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    # Each rank starts with its own angles and weights; those of rank 0 must win.
    layer = OrientedConv1d(8, 7, layer_offset=0.1 + 0.4 * rank)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(1, 8, 9, 10, generator=torch.Generator().manual_seed(7))
    y = parallel(x)
    y.sum().backward()
    torch.save({"y": y.detach(), "theta": layer.theta, "grad": layer.weight.grad}, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_broadcasts_angles(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_ddp, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[1]["theta"], OrientedConv1d(8, 7, layer_offset=0.1).theta)
    for name in ("y", "grad"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert ranks[0][name].abs().sum() > 0


def test_weights_have_the_strides_of_their_gradients_in_both_formats() -> None:
    layer = OrientedConv1d(16, 7).to(memory_format=torch.channels_last)
    layer(torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert layer.weight.stride() == layer.weight.grad.stride() == (7, 7, 7, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"channels": 0, "kernel_size": 7}, ValueError, "channels: expected at least 1, got 0"),
        ({"channels": 8, "kernel_size": 6}, ValueError, "kernel_size: expected an odd number, got 6"),
        ({"channels": 8, "kernel_size": 7.0}, TypeError, "kernel_size: expected an int, got 7.0"),
        ({"channels": 8, "kernel_size": 7, "stride": 0}, ValueError, "stride: expected at least 1"),
        ({"channels": 8, "kernel_size": 7, "num_directions": 0}, ValueError, "num_directions: expected at least 1"),
        ({"channels": 8, "kernel_size": 7, "angles": [0.0] * 5}, ValueError, "angles: .*8 channels, got 5"),
        ({"channels": 2, "kernel_size": 7, "angles": [0.0, math.nan]}, ValueError, "angles: expected finite"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OrientedConv1d(**arguments)


def test_guards_of_a_compiled_call_look_at_text() -> None:
    """Anything but a string would be looked into on each call, and make the modules above be looked into too."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    class Pair(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x))

    model = Pair(OrientedConv1d(8, 7), OrientedConv1d(8, 7, layer_offset=0.5))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(compiled(x), model(x))
    (entry,) = _debug_get_cache_entry_list(Pair.forward.__code__)
    guards = str(entry.guard_manager)
    assert all(f"== '{layer.angles.text}'" in guards for layer in model)
    assert "geometry" not in guards


def test_the_angles_of_a_layer_are_constants_of_a_graph() -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(1, 8, 9, 9)

    def run(x: torch.Tensor) -> torch.Tensor:
        return oriented_conv1d(x, layer.weight, layer.angles, layer.bias)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), expected(layer, x)) < 1e-6
    layer.load_state_dict(turned(layer))
    assert relative_error(compiled(x), expected(layer, x)) < 1e-6


def test_a_compiled_call_with_the_angles_of_other_channels() -> None:
    layer = OrientedConv1d(8, 7)
    layer._directions = "4@0.0 5@1.0"
    with pytest.raises(Exception, match="angles: expected one for each of the 8 channels, got 9"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(1, 8, 9, 9))


def as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in every dtype."""
    monkeypatch.setattr(layers, "_cudnn_in_16_bits", lambda input: True)


@pytest.mark.parametrize(("size", "sides"), [(1, (6, 7)), (2, (6, 9)), (2, (7, 8)), (4, (16, 13))])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_a_convolution(
    size: int, sides: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_products(monkeypatch)
    layer = PatchConv2d(8, 5, size, bias).double()
    convolution = torch.nn.Conv2d(8, 5, size, size, bias=bias).double()
    convolution.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, *sides, dtype=torch.float64)
    for format in (torch.contiguous_format, torch.channels_last):
        results = []
        for module in (convolution, layer):
            module.to(memory_format=format)
            leaf = x.contiguous(memory_format=format).requires_grad_()
            y = module(leaf)
            assert y.is_contiguous(memory_format=format)
            results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
            assert results[-1][1].is_contiguous(memory_format=format)
        if size == 1 or format == torch.channels_last:
            assert results[1][2].stride() == layer.weight.stride()  # as DDP wants it
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_patches_keep_to_what_convolutions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of matrices in contiguous images, compiled graphs, changed layers, under torch.func, and for what
    convolutions refuse."""
    as_products(monkeypatch)
    layer, x = PatchConv2d(8, 5, 2), torch.randn(2, 8, 6, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, 2)
    torch.testing.assert_close(layer(last), expected)

    def linear(*_: object) -> torch.Tensor:
        raise AssertionError("a product")

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with pytest.raises(AssertionError, match="a product"):
        layer(last)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(last[0]), expected[0])
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(last), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(last[None])[0], expected)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        layer(last[:, :, :1])
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 7"):
        layer(last[:, :7].contiguous(memory_format=torch.channels_last))
    assert PatchConv2d(1, 5, 2)(last[:, :1].contiguous()).is_contiguous()  # both formats describe the images
    layer.stride, layer.padding = (1, 1), (1, 1)
    torch.testing.assert_close(layer(last), torch.nn.functional.conv2d(x, layer.weight, layer.bias, 1, 1))


def test_products_are_for_16_bits_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PatchConv2d(8, 5, 2)
    last = torch.randn(2, 8, 6, 8).contiguous(memory_format=torch.channels_last)
    assert not layer._as_product(last)
    assert not layer._as_product(last.bfloat16())
    with FakeTensorMode():
        there = torch.empty(2, 8, 6, 8, device="cuda").contiguous(memory_format=torch.channels_last)
        assert not layer._as_product(there)
        assert not layer._as_product(there.double())
        assert layer._as_product(there.bfloat16())
        assert not layer._as_product(there.bfloat16().contiguous())
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: torch.float16)
        assert layer._as_product(there)


def test_own_angles() -> None:
    layer, x = OrientedConv1d(3, 7, angles=[0.0, 1.0, 2.0]), torch.randn(1, 3, 9, 10)
    assert layer.theta.tolist() == [0.0, 1.0, 2.0]
    assert relative_error(layer(x), expected(layer, x)) < 1e-6
