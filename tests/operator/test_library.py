"""The operators as PyTorch sees them: opcheck, derivatives, compile, export, autocast, FLOPs; the roads of a call."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from oriented1d import OrientedConv1d, geometry, oriented_conv1d, use_backend
from oriented1d.operator import library
from tests.operator import reference
from tests.operator.reference import relative_error

LAYER = geometry.directions(geometry.layer_angles(8))
RUNS = (None, LAYER.text)
THETA = (LAYER.per_channel(), "")


def double(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layer", [RUNS, THETA], ids=["directions", "theta"])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_opcheck(layer: tuple, fmt: torch.memory_format, dtype: torch.dtype, parameters: torch.dtype) -> None:
    x = torch.randn(2, 8, 9, 11).to(dtype).to(memory_format=fmt).requires_grad_()
    w = torch.randn(8, 1, 1, 7).to(parameters).requires_grad_()
    b = torch.randn(8).to(parameters).requires_grad_()
    y = library._conv(x, w, b, *layer, 2, True)
    g = torch.randn_like(y).requires_grad_()
    is_last = fmt == torch.channels_last
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(library._conv, (x, w, b, *layer, 2, True), **tolerance)
    torch.library.opcheck(library._grad_input, (g, w, *layer, 9, 11, 2, True, is_last), **tolerance)
    torch.library.opcheck(library._grad_weight, (g, x, *layer, 7, 2, True), **tolerance)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_first_and_second_derivatives(stride: int, residual: bool) -> None:
    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return oriented_conv1d(x, w, LAYER, b, stride=stride, residual=residual)

    tensors = double(1, 8, 5, 6), double(8, 5), double(8)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    layer = OrientedConv1d(8, 7, stride=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 8, 9, 11), (3, 8, 12, 10)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).to(memory_format=fmt).requires_grad_()
            eager, traced = layer(x), compiled(x)
            assert torch.equal(traced, eager)
            assert traced.stride() == eager.stride()
            ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (traced, eager))
            assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("angles", [LAYER, LAYER.text], ids=["directions", "text"])
def test_angles_that_are_constants_of_a_graph(angles: geometry.Directions | str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return oriented_conv1d(x, w, angles)

    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 7)
    expected = oriented_conv1d(x, w, angles)
    assert relative_error(expected, reference.oriented_conv1d(x, w, LAYER.per_channel(), None, 1, False)) < 1e-6
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="eager")(x, w), expected)
    assert torch.equal(torch.export.export(Layer(), (x, w), strict=True).module()(x, w), expected)
    with pytest.raises(ValueError, match="angles: expected one for each of the 4 channels, got 8"):
        oriented_conv1d(x[:, :4], w[:4], angles)


def test_compiled_function_reads_the_tensor_of_angles_at_run_time() -> None:
    compiled = torch.compile(lambda x, w, a: oriented_conv1d(x, w, a), fullgraph=True, backend="aot_eager")
    x, w, angles = torch.randn(1, 8, 9, 9), torch.randn(8, 7), geometry.layer_angles(8)
    for turned in (angles, angles + 0.3, angles.flip(0)):
        assert relative_error(compiled(x, w, turned), reference.oriented_conv1d(x, w, turned)) < 1e-6
    with pytest.raises(ValueError, match="angles: expected finite"):
        compiled(x, w, angles * float("nan"))


def test_compiled_layer_follows_a_loaded_state_dict() -> None:
    layer = OrientedConv1d(8, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 9, 9)
    before = compiled(x).detach()
    layer.load_state_dict({**layer.state_dict(), "theta": layer.theta + 0.4})
    assert relative_error(compiled(x), reference.oriented_conv1d(x, layer.weight, layer.theta, layer.bias)) < 1e-6
    assert relative_error(compiled(x), before) > 0.1


def test_inductor() -> None:
    layer = OrientedConv1d(8, 7)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), layer, torch.nn.GELU())
    compiled = torch.compile(network, fullgraph=True)
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 11).to(memory_format=fmt)
        eager, fast = network(x), compiled(x)
        assert relative_error(fast, eager) < 1e-5
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(network.parameters())) for y in (fast, eager))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch_and_size(strict: bool) -> None:
    layer = OrientedConv1d(8, 7, stride=2).eval()
    n, h, w = (torch.export.Dim(name, min=3, max=64) for name in ("n", "h", "w"))
    program = torch.export.export(
        layer, (torch.randn(4, 8, 9, 11),), dynamic_shapes=({0: n, 2: h, 3: w},), strict=strict
    )
    x = torch.randn(3, 8, 14, 6)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = OrientedConv1d(8, 31)
    x = torch.randn(2, 8, 12, 14, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    low = [t.detach().to(dtype) for t in (x, layer.weight, layer.bias)]
    expected = reference.oriented_conv1d(low[0], low[1], layer.theta, low[2])
    assert relative_error(y, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    y.square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert x.grad.abs().sum() > 0


def test_autocast_inside_compile() -> None:
    layer = OrientedConv1d(8, 7)
    x = torch.randn(2, 8, 12, 14)
    with torch.autocast("cpu", torch.bfloat16):
        eager = layer(x)
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert traced.dtype == eager.dtype == torch.bfloat16
    assert torch.equal(traced, eager)


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("road", ["short", "dispatcher", "compiled"])
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
def test_autocast_is_casting_by_hand(
    backend: str, dtype: torch.dtype, road: str, stride: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if road == "dispatcher":
        monkeypatch.setattr(library, "_is_plain", lambda *_: False)
    tensors = [torch.randn(2, 8, 9, 11), torch.randn(8, 1, 1, 7), *([torch.randn(8)] if bias else [])]
    leaves, others = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))

    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return oriented_conv1d(x, w, LAYER, b, stride=stride, residual=True)

    ours = torch.compile(run, fullgraph=True, backend="aot_eager") if road == "compiled" else run
    with use_backend(backend):
        with torch.autocast("cpu", dtype):
            y = ours(*leaves)
        z = run(*(t.to(dtype) for t in others))
        results = [
            [value, *torch.autograd.grad(value.float().sin().sum(), all_)] for value, all_ in ((y, leaves), (z, others))
        ]
    assert y.dtype == dtype
    assert all(g.dtype == torch.float32 for g in results[0][1:])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()
        assert a.abs().sum() > 0


@pytest.mark.parametrize("road", ["short", "dispatcher"])
def test_second_derivatives_under_autocast(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if road == "dispatcher":
        monkeypatch.setattr(library, "_is_plain", lambda *_: False)
    tensors = torch.randn(2, 8, 9, 11), torch.randn(8, 7), torch.randn(8)
    results = []
    for by_hand in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        x, w, b = (t.bfloat16() for t in leaves) if by_hand else leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=not by_hand):
            y = oriented_conv1d(x, w, LAYER, b)
        first = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype == torch.float32
        assert a.abs().sum() > 0
    of_weight = 4  # a sum of two, which are not rounded before they are added: the parameter is float32
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        assert relative_error(a, e) < 4e-3 if i == of_weight else torch.equal(a, e)


def test_the_operator_itself_gets_float32_parameters() -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(2, 8, 9, 11, dtype=torch.bfloat16, requires_grad=True)
    low, full = torch.bfloat16, torch.float32
    with torch.autocast("cpu", low), Recorder() as recorder:
        y = layer(x)
    assert recorder.names == ["oriented1d.oriented_conv1d.default"]
    assert recorder.dtypes == [[low, full, full]]
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    called = zip(recorder.names, recorder.dtypes, strict=True)
    assert [dtypes for name, dtypes in called if "grad_input" in name] == [[low, full]]
    layer.half()
    with torch.autocast("cpu", low), Recorder() as recorder:
        layer(x)  # of another dtype: cast before
    assert recorder.names == ["aten._to_copy.default"] * 2 + ["oriented1d.oriented_conv1d.default"]
    assert recorder.dtypes[-1] == [low] * 3


def test_weight_and_bias_of_two_dtypes() -> None:
    x, w, b = torch.randn(2, 8, 9, 11).bfloat16(), torch.randn(8, 7), torch.randn(8)
    expected = library._conv(x, w.bfloat16(), b.bfloat16(), *RUNS, 1, False)
    for weight, bias in ((w, b), (w, b.bfloat16()), (w.bfloat16(), b)):
        assert torch.equal(library._conv(x, weight, bias, *RUNS, 1, False), expected)
    assert [t.dtype for t in library.parameters(x, w, b.bfloat16(), wide=True)] == [torch.float32] * 2
    assert [t.dtype for t in library.parameters(x, w.bfloat16(), b, wide=True)] == [torch.bfloat16] * 2
    assert [t.dtype for t in library.parameters(x, w, b, wide=False)] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ((torch.bfloat16, torch.float64, None), r"weight: .*bfloat16, got torch\.float64"),
        ((torch.bfloat16, torch.float16, None), r"weight: .*bfloat16, got torch\.float16"),
        ((torch.float32, torch.bfloat16, None), r"weight: .*float32, got torch\.bfloat16"),
        ((torch.float64, torch.float32, None), r"weight: .*float64, got torch\.float32"),
        ((torch.bfloat16, torch.float32, torch.float64), r"bias: .*bfloat16, got torch\.float64"),
        ((torch.bfloat16, torch.bfloat16, torch.float16), r"bias: .*bfloat16, got torch\.float16"),
    ],
)
def test_parameters_of_other_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None], words: str) -> None:
    x, w = torch.randn(2, 8, 9, 11).to(dtypes[0]), torch.randn(8, 7).to(dtypes[1])
    b = None if dtypes[2] is None else torch.randn(8).to(dtypes[2])
    with pytest.raises(TypeError, match=words):
        library._conv(x, w, b, *RUNS, 1, False)
    if b is None:
        with pytest.raises(TypeError, match=words):
            library._grad_input(x, w, *RUNS, 9, 11, 1, False, False)


def test_gradients_and_images_have_one_dtype() -> None:
    x = torch.randn(2, 8, 9, 11)
    with pytest.raises(TypeError, match=r"input: .*bfloat16, got torch\.float32"):
        library._grad_weight(x.bfloat16(), x, *RUNS, 7, 1, False)


def test_autocast_leaves_float64_alone() -> None:
    x, w = double(1, 8, 6, 6), double(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = oriented_conv1d(x, w, LAYER)
        assert y.dtype == torch.float64
        for images, weight in ((x, w.float()), (x.float(), w)):
            with pytest.raises(TypeError, match="weight: expected the dtype of the images"):
                oriented_conv1d(images, weight, LAYER)


def test_flops_count_two_for_a_multiply_add() -> None:
    layer = OrientedConv1d(8, 31, stride=2)
    x = torch.randn(2, 8, 11, 20, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    forward = 2 * (2 * 8 * 6 * 10) * 31
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


# The two roads of a call ---------------------------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPERATORS = ("_conv", "_grad_input", "_grad_weight")


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that went through the dispatcher from the functions that choose the road."""
    names: list[str] = []

    def watched(name: str, operator):
        def call(*args):
            names.append(name)
            return operator(*args)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(library, name, watched(name, getattr(library, name)))
    return names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("stride", "residual", "bias"), [(1, False, True), (1, True, False), (2, True, True)])
def test_both_roads_give_the_same(
    device: str, autocast: bool, fmt: torch.memory_format, stride: int, residual: bool, bias: bool,
    dispatched: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = torch.randn(2, 8, 9, 11, device=device).to(memory_format=fmt)
    tensors = [x, torch.randn(8, 1, 1, 7, device=device), *([torch.randn(8, device=device)] if bias else [])]
    results, seen = [], []
    for plain in (library._is_plain, lambda *_: False):
        monkeypatch.setattr(library, "_is_plain", plain)
        dispatched.clear()
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]

        def run(leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return oriented_conv1d(leaves[0], leaves[1], LAYER, *leaves[2:], stride=stride, residual=residual)

        with torch.no_grad():
            values = [run()]
        y = run()
        first = torch.autograd.grad(y.float().sin().sum(), leaves)
        seen.append(list(dispatched))
        again = torch.autograd.grad(run().float().sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
        results.append([*values, y, *first, *again, *second])
    assert seen == [[], ["_conv", "_conv", "_grad_input", "_grad_weight"]]
    for short, long in zip(*results, strict=True):
        assert torch.equal(short, long)
        assert short.stride() == long.stride()
        assert (short.dtype, short.requires_grad) == (long.dtype, long.requires_grad)
        assert short.abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "context",
    [
        pytest.param(lambda device: contextlib.nullcontext(), id="grad"),
        pytest.param(lambda device: torch.no_grad(), id="no_grad"),
        pytest.param(lambda device: torch.inference_mode(), id="inference_mode"),
        pytest.param(lambda device: torch.autocast(device, torch.bfloat16), id="autocast"),
        pytest.param(lambda device: torch.autograd.graph.save_on_cpu(), id="save_on_cpu"),
    ],
)
def test_plain_calls_take_the_shorter_road(device: str, context, dispatched: list[str]) -> None:
    layer = OrientedConv1d(8, 7, residual=True).to(device)
    x = torch.randn(2, 8, 9, 11, device=device, requires_grad=True)
    expected = reference.oriented_conv1d(x, layer.weight, layer.theta, layer.bias, residual=True)
    with context(device):
        y = layer(x)
        recorded = torch.is_grad_enabled()
    assert relative_error(y, expected) < (1e-2 if y.dtype == torch.bfloat16 else 1e-6)
    assert y.requires_grad == recorded
    if recorded:
        y.square().sum().backward()
        assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, layer.weight, layer.bias))
    assert dispatched == []


class Subclass(torch.Tensor):
    pass


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[list[torch.dtype]] = []  # of the tensors among the arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        self.dtypes.append([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
        return func(*args, **(kwargs or {}))


def _under(mode):
    def run(f, x):
        with mode:
            return f(x)

    return run


def _dead_wrapper(f, x):
    kept = []
    torch.func.grad(lambda t: (kept.append(t * 1), t.sum())[1])(x)
    return f(kept[0])


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(_under(Recorder()), id="dispatch mode"),
        pytest.param(_under(BaseTorchFunctionMode()), id="function mode"),
        pytest.param(_under(torch.device("cpu")), id="default device"),
        pytest.param(_under(FlopCounterMode(display=False)), id="FLOP counter"),
        pytest.param(_under(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])), id="profiler"),
        pytest.param(lambda f, x: torch.func.vmap(f)(x[None])[0], id="vmap"),
        pytest.param(lambda f, x: torch.func.functionalize(f)(x), id="functionalize"),
        pytest.param(lambda f, x: make_fx(f)(x)(x), id="make_fx"),
        pytest.param(lambda f, x: make_fx(f, pre_dispatch=True)(x)(x), id="make_fx before dispatch"),
        pytest.param(lambda f, x: torch.jit.trace(f, x, check_trace=False)(x), id="jit.trace"),
        pytest.param(lambda f, x: f(x.as_subclass(Subclass)).as_subclass(torch.Tensor), id="subclass"),
        pytest.param(lambda f, x: f(torch.complex(x, -x).conj().imag), id="negated"),
        pytest.param(lambda f, x: f(torch._efficientzerotensor(x.shape)) + f(x) - f(x * 0), id="zero tensor"),
        pytest.param(_dead_wrapper, id="left over from torch.func"),
    ],
)
def test_what_must_see_the_operator_sees_it(call, dispatched: list[str]) -> None:
    x, w = torch.randn(2, 8, 9, 11), torch.randn(8, 7)

    def run(x: torch.Tensor) -> torch.Tensor:
        return oriented_conv1d(x, w, LAYER)

    expected = run(x)
    assert dispatched == []
    assert relative_error(call(run, x), expected) < 1e-6
    assert dispatched == ["_conv"]


def test_a_mode_sees_all_three_operators(dispatched: list[str]) -> None:
    x, w = torch.randn(2, 8, 9, 11, requires_grad=True), torch.randn(8, 7, requires_grad=True)
    y = oriented_conv1d(x, w, LAYER)  # backward calls of the shorter road too
    with Recorder() as recorder:
        oriented_conv1d(x, w, LAYER)
        y.sum().backward()
    names = [name.removeprefix("oriented1d.").removesuffix(".default") for name in recorder.names if "oriented" in name]
    assert names == ["oriented_conv1d", "oriented_conv1d_grad_input", "oriented_conv1d_grad_weight"]
    assert dispatched == list(OPERATORS)


def test_fake_tensors(dispatched: list[str]) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 8, 9, 11, requires_grad=True)
        y = oriented_conv1d(x, torch.empty(8, 7), LAYER, stride=2)
        (g,) = torch.autograd.grad(y.sum(), x)
    assert isinstance(y, FakeTensor)
    assert isinstance(g, FakeTensor)
    assert (y.shape, g.shape) == ((2, 8, 5, 6), x.shape)
    assert dispatched == ["_conv", "_grad_input"]


def test_checkpointed_call_keeps_and_repeats() -> None:
    layer, x = OrientedConv1d(8, 7), torch.randn(2, 8, 9, 11, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize(("needs", "kept"), [((1, 1), ["x", "w"]), ((1, 0), ["w"]), ((0, 1), ["x"])])
def test_only_what_the_backward_pass_needs_is_kept(needs: tuple[int, int], kept: list[str]) -> None:
    x, w = torch.randn(2, 8, 9, 11).requires_grad_(bool(needs[0])), torch.randn(8, 7).requires_grad_(bool(needs[1]))
    names = {x.data_ptr(): "x", w.data_ptr(): "w"}
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        oriented_conv1d(x, w, LAYER)
    assert [names[tensor.data_ptr()] for tensor in packed] == kept
