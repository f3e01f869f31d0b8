"""``oriented1d doctor``: what it says, and that it finds a backend that computes something wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import yaml

import oriented1d
from oriented1d.analysis import doctor
from oriented1d.cli import main
from oriented1d.operator import cpu, portable

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = re.compile(r"  (pass|FAIL)  (\S+) (\S+) (\S+) (\S+) stride (\d): (.*)")


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[tuple[str, ...]]]:
    """Exit code, output, and the parts of each line of the self-check on the CPU."""
    code = main(["doctor"])
    printed = capsys.readouterr().out
    checks = [match.groups() for match in map(CHECK.fullmatch, printed.splitlines()) if match]
    return code, printed, [check for check in checks if check[1] == "cpu"]


def test_healthy(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path / "kernels"))
    code, printed, checks = run(capsys)
    assert code == 0
    for what in (
        f"oriented1d {oriented1d.__version__} in ",
        f"torch {torch.__version__.partition('+')[0]}",
        f"timm {timm.__version__}",
        f"CUDA of torch {torch.version.cuda or 'none'}, NVRTC ",
        f"{torch.get_num_threads()} threads of torch",
        "cpu float32, bfloat16, float16, float64: cpu (numba ",
        f"CUDA kernels: {tmp_path / 'kernels'} (writable)",
        "CPU loops: ",
        f"ORIENTED1D_CACHE={tmp_path / 'kernels'}",
    ):
        assert what in printed, what
    assert "missing:" not in printed
    assert [check[:6] for check in checks] == [
        ("pass", "cpu", backend, *case)
        for backend in ("cpu", "portable")
        for case in (
            ("float32", "contiguous", "1"),
            ("float32", "channels_last", "2"),
            ("bfloat16", "channels_last", "1"),
        )
    ]
    for check in checks:
        error = float(re.fullmatch(r"error (\S+) of \S+ allowed", check[6])[1])
        assert 0 < error < {"float32": 1e-6, "bfloat16": 5e-3}[check[3]]  # well below what is allowed
    assert re.search(r"\nall \d+ checks passed \(\d+\.\d s\)\n$", printed)


@pytest.mark.parametrize("function", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_backend_that_computes_something_wrong_is_found(capsys, monkeypatch, function, fault):
    right = getattr(cpu, function)

    def wrong(*args):
        result = right(*args)
        return (result[0] * fault, result[1]) if isinstance(result, tuple) else result * fault

    monkeypatch.setattr(cpu, function, wrong)
    code, printed, checks = run(capsys)
    assert code == 1
    assert [check[0] for check in checks if check[3] == "float32"] == ["FAIL", "FAIL", "pass", "pass"]
    assert [check[2] for check in checks] == ["cpu"] * 3 + ["portable"] * 3
    assert re.search(r"\n[23] of \d+ checks failed", printed)


def test_a_backend_that_raises_is_found(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(cpu, "forward", broken)
    code, _, checks = run(capsys)
    assert code == 1
    assert [check[6] for check in checks if check[0] == "FAIL"] == ["RuntimeError: no kernel image is available"] * 3


def test_the_reference_itself_is_compared_in_float64(monkeypatch):
    seen = []
    right = portable.forward
    monkeypatch.setattr(portable, "forward", lambda *args: seen.append(args[0].dtype) or right(*args))
    doctor.parity(torch.device("cpu"), "cpu", torch.bfloat16, torch.channels_last, 1)
    assert seen == [torch.float64]


def test_the_stem_is_compared_with_float64(monkeypatch):
    cpu = torch.device("cpu")  # which has the same operator, without a kernel
    assert 1e-4 < doctor.stem_parity(cpu) < doctor.TOLERANCE[torch.bfloat16]
    monkeypatch.setattr(doctor.stem, "supported", lambda *arguments: True)
    monkeypatch.setattr(doctor, "devices", lambda: [cpu])
    lines = [line for _, line in doctor.self_check()]
    assert lines[-1].startswith("pass  cpu stem bfloat16: error ")


@pytest.mark.gpu
def test_healthy_on_a_gpu():
    results = list(doctor.self_check())
    assert all(passed for passed, _ in results), results
    assert any("cuda:0 stem bfloat16" in line for _, line in results)


def test_without_numba(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setitem(sys.modules, "oriented1d.operator.cpu_kernels", None)
    code, printed, checks = run(capsys)
    assert code == 0
    assert "cpu float32, bfloat16, float16, float64: portable (numba cannot be imported (" in printed
    assert {check[2] for check in checks} == {"portable"}


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path / "file" / "kernels"))
    code, printed, _ = run(capsys)
    assert code == 0
    assert f"CUDA kernels: expected a folder that can be written to, got {tmp_path / 'file' / 'kernels'}" in printed
    assert "compiled anew in each process" in printed


def test_without_the_extras(monkeypatch):
    """With nothing that only an extra brings, it runs and names what is missing."""
    extras = doctor.PACKAGES["train"] + doctor.PACKAGES["export"]
    modules = [{"scikit-learn": "sklearn", "onnx-ir": "onnx_ir"}.get(package, package) for package in extras]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({modules!r}))
from oriented1d.analysis import doctor
found = doctor._version
doctor._version = lambda package: None if package in {extras!r} else found(package)
print("\\n".join(doctor.versions()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert f"missing: {', '.join(doctor.PACKAGES['train'])}: pip install 'oriented1d[train]'" in done.stdout
    assert f"missing: {', '.join(doctor.PACKAGES['export'])}: pip install 'oriented1d[export]'" in done.stdout


def test_packages_are_those_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}
    del listed["test"]
    names = {extra: tuple(re.match(r"[\w-]+", line)[0] for line in lines) for extra, lines in listed.items()}
    assert names == doctor.PACKAGES


def test_bug_reports_ask_for_it():
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    asked = {part["id"]: part for part in form["body"]}
    assert "oriented1d doctor" in asked["doctor"]["attributes"]["label"]
    assert asked["doctor"]["validations"]["required"] is True
