import csv
import itertools
import math
import os
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

from oriented1d.analysis import benchmark
from oriented1d.analysis.benchmark import network, operator, plots, results
from oriented1d.cli import main

ANGLES = [0, 22.5, 45, 67.5, 90, 112.5, 135, 157.5]


def read(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_quantiles() -> None:
    assert results.quantiles([50.0, 10.0, 40.0, 20.0, 30.0, 60.0]) == (20.0, 30.0, 50.0)
    assert results.quantiles([7.0]) == (7.0, 7.0, 7.0)


# The operator ---------------------------------------------------------------------------------------------------------


def case(**changes) -> operator.Case:
    fields = {
        "shape": (1, 8, 9, 9),
        "kernel_size": 7,
        "stride": 1,
        "dtype": torch.float32,
        "channels_last": False,
        "angle": None,
        "device": torch.device("cpu"),
    }
    return operator.Case(**{**fields, **changes})


def test_rows_hold_ratios_of_medians() -> None:
    times = {
        "copy": [1.0, 2.0, 3.0],
        "forward": [5.0, 4.0, 3.0],
        "grad-input": [1.0] * 3,
        "grad-weight": [1.0] * 3,
        "total": [10.0] * 3,
        "portable forward": [8.0] * 3,
        "pytorch forward": [16.0] * 3,
        "pytorch total": [5.0] * 3,
    }
    forward, grad_input, _, total = operator.rows_of(case(), times)
    assert (forward["ms_p50"], forward["copy_ms"], forward["ratio_to_copy"]) == ("4.0000", "2.0000", "2.000")
    assert (forward["ratio_to_pytorch_1xk"], forward["ratio_to_portable"]) == ("0.250", "0.500")
    assert (total["ratio_to_pytorch_1xk"], grad_input["ratio_to_pytorch_1xk"]) == ("2.000", "")
    # 8 * 9 * 9 floats in and out in 4 ms, and three times as much in 10 ms.
    assert float(forward["gb_per_s"]) == pytest.approx(2 * 648 * 4 / 4e6, abs=0.05)  # type: ignore[arg-type]


def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = operator.oriented_conv1d
    monkeypatch.setattr(operator, "oriented_conv1d", lambda *a, **k: real(*a, **k) * 1.001)
    with pytest.raises(operator.ParityError, match="relative errors"):
        benchmark.main(["operator", "--device", "cpu", "--shapes", "1x8x9x9", "--runs", "1"])
    assert "ms" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", operator.TOLERANCE)
def test_parity_of_every_dtype(dtype: torch.dtype) -> None:
    assert 0 < operator.check_parity(case(dtype=dtype, stride=2, channels_last=True)) <= operator.TOLERANCE[dtype]


def test_operator_command_writes_what_it_measured(tmp_path) -> None:
    output = tmp_path / "folder" / "results.csv"
    arguments = ["operator", "--device", "cpu", "--shapes", "1x16x9x9", "--runs", "2", "--kernel-size", "7"]
    assert benchmark.main([*arguments, "--output", str(output)]) == 0
    rows = read(output)
    assert len(rows) == 2 * len(operator.DIRECTIONS)
    assert {row["torch"] for row in rows} == {torch.__version__}
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["ratio_to_copy"]) > 0
    assert float(rows[0]["ratio_to_pytorch_7x7"]) > 0
    assert list(output.parent.iterdir()) == [output]


def test_table5_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_figures(monkeypatch)
    output, plot = tmp_path / "table5.csv", tmp_path / "folder" / "table5.svg"
    arguments = ["table5", "--device", "cpu", "--sizes", "9", "5", "--kernel-sizes", "7", "--batch", "1"]
    options = ["--channels", "4", "--runs", "1", "--output", str(output), "--plot", str(plot)]
    assert benchmark.main([*arguments, *options]) == 0
    rows = read(output)
    assert [(row["size"], float(row["angle"])) for row in rows] == [
        *(("9", a) for a in ANGLES),
        *(("5", a) for a in ANGLES),
    ]
    assert all(float(row["forward_backward_ms"]) > 0 for row in rows)
    assert plot.stat().st_size > 5000
    panels = drawn[0].axes
    assert [ax.get_title() for ax in panels] == ["9x9, kernel size 7", "5x5, kernel size 7"]
    columns = [
        "forward_ms",
        "forward_backward_without_grad_input_ms",
        "forward_backward_ms",
        "pytorch_horizontal_forward_ms",
        "pytorch_horizontal_forward_backward_ms",
        "copy_ms",
    ]
    for ax, size in zip(panels, ("9", "5"), strict=True):
        for line, column in zip(ax.lines, columns, strict=True):
            assert list(line.get_xdata()) == ANGLES
            assert list(line.get_ydata()) == [float(row[column]) for row in rows if row["size"] == size]


def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    return figures


def fake_times(case: operator.Case, runs: int) -> dict[str, list[float]]:
    """Times that depend on the case: the copy's grows with the images, the others' with the angle too."""
    copy = math.prod(case.shape) / 1000
    names = ["forward", "grad-input", "grad-weight", "total", "portable forward"]
    return {"copy": [copy], **{name: [copy * (2 + i) + (case.angle or 0)] for i, name in enumerate(names)}}


def test_operator_against_the_angle(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_figures(monkeypatch)
    monkeypatch.setattr(operator, "measure_case", fake_times)
    output, plot = tmp_path / "rows.csv", tmp_path / "angles.png"
    arguments = ["operator", "--device", "cpu", "--shapes", "1x8x9x9", "1x8x5x5", "--kernel-size", "7"]
    assert benchmark.main([*arguments, "--angles", "each", "--output", str(output), "--plot", str(plot)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["angles.png", "rows.csv"]
    rows = read(output)
    titles = [f"{shape}, float32, {layout}" for shape in ("1x8x9x9", "1x8x5x5") for layout in operator.LAYOUTS]
    assert [ax.get_title() for ax in drawn[0].axes] == titles
    for ax in drawn[0].axes:
        shape, _, layout = ax.get_title().split(", ")
        *lines, copy = ax.lines
        assert [line.get_label() for line in lines] == list(operator.DIRECTIONS)
        assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 4
        for line in lines:
            key = (shape, layout, line.get_label())
            shown = [row for row in rows if (row["shape"], row["layout"], row["direction"]) == key]
            assert list(line.get_xdata()) == ANGLES
            assert list(line.get_ydata()) == [float(row["ms_p50"]) for row in shown]
        assert list(copy.get_ydata()) == [0.648 if shape == "1x8x9x9" else 0.2] * 8


def test_operator_against_the_size(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    drawn = drawn_figures(monkeypatch)
    monkeypatch.setattr(operator, "measure_case", fake_times)
    arguments = ["operator", "--device", "cpu", "--shapes", "1x8x9x9", "2x8x9x9", "1x8x5x5", "--kernel-size", "7"]
    assert benchmark.main([*arguments, "--layouts", "contiguous", "--plot", str(tmp_path / "sizes.pdf")]) == 0
    (ax,) = drawn[0].axes
    *lines, copy = ax.lines
    assert list(copy.get_xdata()) == [200, 648, 1296]
    assert list(copy.get_ydata()) == [0.2, 0.648, 1.296]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1x8x5x5", "1x8x9x9", "2x8x9x9"]
    for i, line in enumerate(lines):
        assert list(line.get_ydata()) == pytest.approx([(2 + i) * ms for ms in (0.2, 0.648, 1.296)], abs=1e-4)


# Networks -------------------------------------------------------------------------------------------------------------


def line(**changes) -> network.Case:
    fields = {
        "model": "convnext_atto_1d",
        "mode": "inference",
        "batch": 2,
        "size": 32,
        "dtype": "float32",
        "layout": "channels_last",
        "compile": "none",
        "device": "cpu",
        "warmup": 3,
        "runs": 5,
    }
    return network.Case(**{**fields, **changes})


@pytest.mark.parametrize("mode", [*network.MODES, "latency"])
def test_steps_are_what_they_say(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("convnext_atto_1d", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3).eval()
    seen = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        (images,) = inputs
        last = images.is_contiguous(memory_format=torch.channels_last)
        seen.append((tuple(images.shape), last, module.training, torch.is_inference_mode_enabled(), output.dtype))

    model.register_forward_hook(look)
    monkeypatch.setattr(network.networks, "create", lambda name: model)
    ticks = itertools.count(step=0.25)
    monkeypatch.setattr(network, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    measured = network.measure(line(mode=mode, dtype="bfloat16"))
    assert measured.ms == [250.0] * 5
    training = mode == "training"
    assert seen == [((2, 3, 32, 32), True, training, not training, torch.bfloat16)] * 8
    gradients = [parameter.grad for parameter in model.parameters()]
    if training:
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert max(gradient.abs().max() for gradient in gradients) > 0
        # The gradients of one step, not of all: those of the classifier's biases add up to zero and are below one.
        assert model.head.bias.grad.abs().max() < 1
    else:
        assert gradients == [None] * len(gradients)
    if sys.platform == "linux" and mode != "latency":  # which adds nothing to the peak that inference reached before it
        assert 0 < measured.peak_memory_mib < 4096


def test_the_mode_of_compilation_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile(model: nn.Module, mode: str) -> nn.Module:
        asked.append(mode)
        return model

    monkeypatch.setattr(network.networks, "create", lambda name: timm.create_model("convnext_atto_1d", dims=(8,) * 4))
    monkeypatch.setattr(network.torch, "compile", compile)
    for name in network.COMPILE:
        network.measure(line(compile=name, runs=1, warmup=1))
    assert asked == ["default", "reduce-overhead", "max-autotune"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*network.MODES, "latency"])
@pytest.mark.parametrize("compile", ["none", "reduce-overhead"])
def test_a_network_on_a_gpu(compile: str, mode: str) -> None:
    measured = network.measure(line(mode=mode, compile=compile, device="cuda", dtype="bfloat16"))
    assert len(measured.ms) == 5
    assert all(0 < ms < 60_000 for ms in measured.ms)
    parameters = 3_667_648 * 4 / 2**20
    at_least = 2 * parameters if mode == "training" else parameters  # weights, and their gradients
    if compile == "none":
        assert at_least < measured.peak_memory_mib < 1024
    else:
        assert measured.peak_memory_mib is None


def test_rates_are_images_by_time() -> None:
    ms = [10.0, 20.0, 25.0, 40.0, 50.0, 100.0]
    row = network.row_of(line(batch=4), network.Measurement(ms, 12.4))
    assert list(row) == [
        "model", "mode", "batch", "size", "dtype", "layout", "compile", "warmup", "runs",
        "img_per_s_p20", "img_per_s_p50", "img_per_s_p80", "ms_p50", "peak_memory_mib", "error",
    ]  # fmt: skip
    # 4 images in 10 to 100 ms are 400, 200, 160, 100, 80 and 40 a second.
    rates = (row["img_per_s_p20"], row["img_per_s_p50"], row["img_per_s_p80"])
    assert rates == ("80.00", "100.00", "200.00")
    assert (row["ms_p50"], row["peak_memory_mib"], row["error"]) == ("25.000", "12", "")
    assert network.row_of(line(), network.Measurement(ms, None))["peak_memory_mib"] == ""
    failed = network.row_of(line(), "out of memory")
    assert (failed["error"], failed["img_per_s_p50"], failed["model"]) == ("out of memory", "", "convnext_atto_1d")


def test_a_network_that_fails_does_not_stop_the_others(tmp_path) -> None:
    output, plot = tmp_path / "networks.csv", tmp_path / "networks.png"
    arguments = ["vit_tiny_patch16_224", "convnext_atto_1d", "--device", "cpu", "--batch-size", "2", "--size", "32"]
    options = ["--dtype", "float32", "--compile", "none", "--mode", "inference", "--runs", "2", "--warmup", "1"]
    files = ["--output", str(output), "--plot", str(plot)]
    assert main(["benchmark", "network", *arguments, *options, *files]) == 1
    failed, measured = read(output)
    assert failed["error"].startswith("AssertionError: Input height (32) doesn't match model (224)")
    assert (failed["model"], failed["img_per_s_p50"], failed["ms_p50"]) == ("vit_tiny_patch16_224", "", "")
    assert (measured["model"], measured["mode"], measured["error"]) == ("convnext_atto_1d", "inference", "")
    assert float(measured["img_per_s_p20"]) <= float(measured["img_per_s_p50"]) <= float(measured["img_per_s_p80"])
    how = {"batch": "2", "size": "32", "dtype": "float32", "layout": "channels_last", "compile": "none"}
    assert {key: measured[key] for key in how} == how
    assert (measured["warmup"], measured["runs"], measured["torch"]) == ("1", "2", torch.__version__)
    assert plot.stat().st_size > 5000


def die(case: network.Case) -> network.Measurement:
    os.kill(os.getpid(), 9)
    raise AssertionError


def test_a_process_that_dies() -> None:
    assert network.isolated(die, line()) == "the process ended without a result, killed by SIGKILL"


def test_all_networks_and_modes_get_a_row(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    def answer(function, case: network.Case) -> network.Measurement:
        assert function is network.measure
        assert (case.batch, case.size, case.dtype, case.layout) == (128, 224, "bfloat16", "channels_last")
        assert (case.compile, case.warmup, case.runs) == ("default", 10, 30)
        return network.Measurement([len(case.model) * (1.0 if case.mode == "inference" else 4.0)] * case.runs, 1.0)

    drawn = drawn_figures(monkeypatch)
    monkeypatch.setattr(network, "isolated", answer)
    plot = tmp_path / "networks.png"
    assert benchmark.main(["network", "a", "bbbb", "--device", "cpu", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "a inference: 128000.00 images/s" in printed
    assert "30 runs after 10 to warm up; training without the optimizer's step" in printed
    (ax,) = drawn[0].axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "bbbb"]
    assert [bars.get_label() for bars in ax.containers] == ["inference", "training"]
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[128000, 32000], [32000, 8000]]
    assert [text.get_text() for text in ax.texts] == ["128,000", "32,000", "32,000", "8,000"]
    assert len({bar.get_hatch() for bars in ax.containers for bar in bars}) == 2


def test_a_failed_network_in_the_figure() -> None:
    cases = [line(mode=mode) for mode in network.MODES]
    rows = [network.row_of(cases[0], network.Measurement([30.0], None)), network.row_of(cases[1], "out of memory")]
    (ax,) = plots.network_figure(rows, "a device").axes
    assert [bars[0].get_height() for bars in ax.containers] == [66.67, 0]
    assert [text.get_text() for text in ax.texts] == ["66.7", "failed"]
    assert ax.get_title() == "batch 2, 32x32, float32, channels_last, not compiled\na device"


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["operator", "--shapes", "8x9x9"], 2, "expected a shape NxCxHxW, as in 8x96x56x56, got 8x9x9"),
        (["operator", "--runs", "0"], 2, "expected a positive number, got 0"),
        (["table5", "--device", "cuda:99"], 2, "expected cpu or a GPU of this machine (cuda, cuda:1), got cuda:99"),
        (["table5", "--device", "cpu", "--plot", "table.xyz"], 1, "--plot: expected a file of type "),
        (["network", "resnet18", "--device", "cpu", "--output", "/dev/null/x.csv"], 1, "--output: expected a folder"),
        (["network", "--device", "cpu"], 2, "the following arguments are required: MODEL"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    assert main(["benchmark", *arguments]) == code
    (error,) = (text for text in capsys.readouterr().err.splitlines() if "error: " in text)
    assert message in error


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "oriented1d.analysis.benchmark.plots")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["benchmark", "operator", "--device", "cpu", "--plot", "times.png"]) == 1
    assert "--plot: needs matplotlib.axes: pip install 'oriented1d[train]'" in capsys.readouterr().err
