"""``oriented1d benchmark kernels``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from oriented1d.analysis import benchmark, networks
from oriented1d.analysis.benchmark import kernels
from oriented1d.analysis.benchmark.kernels import DEPTHWISE, ORIENTED, OTHER, POINTWISE, PRODUCTS, Device
from oriented1d.analysis.benchmark.network import Case

DEVICE = Device(bandwidth=1e12, rate=100e12)


def case(mode: str = "inference", dtype: str = "bfloat16") -> Case:
    return Case("convnext_atto_1d", mode, 10, 64, dtype, "channels_last", "default", "cuda", 1, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("oriented_gather", ORIENTED),
        ("oriented_reduce", ORIENTED),
        ("triton_per_fused__to_copy_native_layer_norm_oriented_conv1d_permute_view_5", POINTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", POINTWISE),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", PRODUCTS),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_64x128>", PRODUCTS),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<7>", DEPTHWISE),
        ("depthwise_conv2d", DEPTHWISE),
        ("Memset (Device)", OTHER),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kernels.kind_of(name) == kind


def test_floors_by_hand() -> None:
    """One oriented layer, one linear layer, one norm: bytes over bandwidth, operations over rate."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from oriented1d.layers import OrientedConv1d

            self.layer, self.norm, self.out = (
                OrientedConv1d(3, 31),
                torch.nn.LayerNorm(64),
                torch.nn.Linear(64, 6400),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.layer(x)))

    pixels = 3 * 64 * 64
    floor = kernels.floors(Net(), case(), DEVICE)
    assert floor[ORIENTED] == pytest.approx(10 * 2 * pixels * 2 / 1e12 * 1e3)
    assert floor[POINTWISE] == pytest.approx(10 * 2 * pixels * 2 / 1e12 * 1e3)
    bytes_, operations = 2 * (pixels + 100 * pixels) / 1e12, 2 * 100 * pixels * 64 / 100e12
    assert floor[PRODUCTS] == pytest.approx(10 * max(bytes_, operations) * 1e3)
    assert floor[DEPTHWISE] == floor[OTHER] == 0
    training = kernels.floors(Net(), case("training", "float32"), DEVICE)
    assert training[ORIENTED] == pytest.approx(6 * floor[ORIENTED])
    assert training[POINTWISE] == pytest.approx(5 * floor[POINTWISE])


def test_the_stem_that_is_one_kernel_counts_as_one() -> None:
    model = networks.create("convnext_atto_1d")
    low, full = (kernels.floors(model, case(dtype=dtype), DEVICE) for dtype in ("bfloat16", "float32"))
    # Without its second half and the linear layer before it, float32 has twice the bytes and otherwise the same layers.
    read, between = 3 * 64 * 64, model.downsample_layers[0].dw1.weight.shape[0] * 64 * 64
    assert full[ORIENTED] / 2 - low[ORIENTED] == pytest.approx(10 * 2 * (between - read) / 1e12 * 1e3)
    assert low[PRODUCTS] < full[PRODUCTS]
    assert kernels.floors(networks.create("convnext_atto"), case(), DEVICE)[DEPTHWISE] > 0


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = dict.fromkeys(kernels.KINDS, (0, 0.0)) | {ORIENTED: (14, 0.25), PRODUCTS: (30, 1.5)}
    measured = kernels.KernelMeasurement([2.0, 3.0, 4.0], 100.0, found, DEVICE)
    answers = iter([measured, "out of memory"])
    monkeypatch.setattr(kernels.network, "isolated", lambda function, case: next(answers))
    monkeypatch.setattr(benchmark, "_device", torch.device)
    monkeypatch.setattr(benchmark, "environment", lambda device: {"device": "some GPU"})
    monkeypatch.setattr(benchmark.results, "environment", lambda device: {"device": "some GPU"})
    out = tmp_path / "kernels.csv"
    assert benchmark.main(["kernels", "convnext_atto_1d", "--device", "cuda", "--output", str(out)]) == 1
    rows = list(csv.DictReader(out.open()))
    assert [(row["kind"], row["kernels"], row["ms"]) for row in rows] == [
        (ORIENTED, "14", "0.250"),
        (PRODUCTS, "30", "1.500"),
        ("all kernels", "44", "1.750"),
        ("a step, not profiled", "", "3.000"),
        ("", "", ""),
    ]
    assert float(rows[0]["floor_ms"]) > 0
    assert rows[-1]["error"] == "out of memory"


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture) -> None:
    from oriented1d.cli import main

    assert main(["benchmark", "kernels", "convnext_atto_1d", "--device", "cpu"]) == 1
    assert "--device: expected a GPU, got cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_network_on_a_gpu() -> None:
    small = Case("convnext_atto_1d", "training", 4, 64, "bfloat16", "channels_last", "none", "cuda", 2, 3)
    result = kernels.measure(small)
    assert result.kernels[ORIENTED][0] > 20  # three directions of nine layers
    assert result.kernels[PRODUCTS][0] > 20
    assert result.device.bandwidth > 0
    assert result.device.rate > 0
