import csv

import pytest
import torch

from oriented1d.analysis import benchmark


def case(**changes) -> benchmark.Case:
    fields = {
        "shape": (1, 8, 9, 9),
        "kernel_size": 7,
        "stride": 1,
        "dtype": torch.float32,
        "channels_last": False,
        "angle": None,
        "device": torch.device("cpu"),
    }
    return benchmark.Case(**{**fields, **changes})


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
    forward, grad_input, _, total = benchmark.rows_of(case(), times)
    assert (forward["ms_p50"], forward["ratio_to_copy"]) == ("4.0000", "2.000")
    assert (forward["ratio_to_pytorch_1xk"], forward["ratio_to_portable"]) == ("0.250", "0.500")
    assert (total["ratio_to_pytorch_1xk"], grad_input["ratio_to_pytorch_1xk"]) == ("2.000", "")
    # 8 * 9 * 9 floats in and out in 4 ms, and three times as much in 10 ms.
    assert float(forward["gb_per_s"]) == pytest.approx(2 * 648 * 4 / 4e6, abs=0.05)  # type: ignore[arg-type]


def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = benchmark.oriented_conv1d
    monkeypatch.setattr(benchmark, "oriented_conv1d", lambda *a, **k: real(*a, **k) * 1.001)
    with pytest.raises(benchmark.ParityError, match="relative errors"):
        benchmark.main(["operator", "--device", "cpu", "--shapes", "1x8x9x9", "--runs", "1"])
    assert "ms" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", benchmark.TOLERANCE)
def test_parity_of_every_dtype(dtype: torch.dtype) -> None:
    assert 0 < benchmark.check_parity(case(dtype=dtype, stride=2, channels_last=True)) <= benchmark.TOLERANCE[dtype]


def test_operator_command_writes_what_it_measured(tmp_path) -> None:
    output = tmp_path / "folder" / "results.csv"
    arguments = ["operator", "--device", "cpu", "--shapes", "1x16x9x9", "--runs", "2", "--kernel-size", "7"]
    assert benchmark.main([*arguments, "--output", str(output)]) == 0
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 2 * len(benchmark.DIRECTIONS)
    assert {row["torch"] for row in rows} == {torch.__version__}
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["ratio_to_copy"]) > 0
    assert float(rows[0]["ratio_to_pytorch_7x7"]) > 0
    assert list(output.parent.iterdir()) == [output]


def test_table5_command(tmp_path) -> None:
    output = tmp_path / "table5.csv"
    arguments = ["table5", "--device", "cpu", "--sizes", "9", "--kernel-sizes", "7", "--batch", "1", "--channels", "4"]
    assert benchmark.main([*arguments, "--runs", "1", "--output", str(output)]) == 0
    rows = list(csv.DictReader(output.open()))
    assert [row["angle"] for row in rows] == ["0", "22.5", "45", "67.5", "90", "112.5", "135", "157.5"]
    assert all(float(row["forward_backward_ms"]) > 0 for row in rows)
