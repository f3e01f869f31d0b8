"""``oriented1d study``: its runs, what it keeps of them, and its report."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oriented1d.analysis import study
from oriented1d.cli import main
from oriented1d.training.errors import UserError
from tests.classification.conftest import image_folder  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "classification"
SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=2",
    "--trainer.log_every_n_steps=1",
    "--model.network_args.depths=[1,1,1,1]",
    "--model.network_args.dims=[8,8,8,8]",
    "--model.num_classes=3",
    "--model.warmup_epochs=1",
    "--data.batch_size=16",
)
POPEN = subprocess.Popen


def rows_of(results: Path) -> list[dict[str, str]]:
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def row(network: str, seed: int, top1: float, dataset: str = "textures", **more: Any) -> dict[str, Any]:
    where = {"date": "2026-01-02", "device": "A GPU", "torch": "9.9"}
    what = {"dataset": dataset, "network": network, "seed": str(seed), "parameters": "1234567", "epochs": "40"}
    return {**where, **what, "top1": str(top1), "options": "", **more}


ROWS = [
    row("2d", 0, 0.80), row("2d", 1, 0.82), row("2d", 2, 0.84),
    row("1d horizontal", 0, 0.70), row("1d horizontal", 1, 0.73),
    row("1d", 0, 0.915, "clothes", options="--model.lr 1"),
]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    study.write_rows({(r["dataset"], r["network"], r["seed"]): r for r in ROWS}, tmp_path / "study.csv")
    return tmp_path / "study.csv"


@pytest.mark.slow
def test_runs_are_made_once_and_kept(tmp_path, image_folder, capsys):  # noqa: F811
    results = tmp_path / "results" / "study.csv"
    command = [
        "study", "run", str(CONFIGS / "study_textures.yaml"), f"--root=textures={image_folder}", "--networks", "2d",
        "1d horizontal", "--seeds=3", "--jobs=2", f"--folder={tmp_path / 'runs'}", f"--results={results}", "--", *SMALL,
    ]  # fmt: skip
    assert main(command) == 0
    assert "2 of 2 runs done, 0 failed" in capsys.readouterr().out
    rows = {r["network"]: r for r in rows_of(results)}
    assert rows.keys() == {"2d", "1d horizontal"}
    for name, found in rows.items():
        folder = tmp_path / "runs" / "textures" / name.replace(" ", "_") / "seed3"
        assert (found["dataset"], found["seed"], found["epochs"]) == ("textures", "3", "2")
        with (folder / "version_0" / "metrics.csv").open() as file:
            top1 = [float(r["val/top1"]) for r in csv.DictReader(file) if r["val/top1"]]
        assert float(found["top1"]) == pytest.approx(top1[-1], abs=1e-4)
        assert len(top1) == 1
        config = (folder / "version_0" / "config.yaml").read_text()
        assert "seed_everything: 3" in config
        assert "seed: 3" in config.partition("data:")[2]
        assert f"root: {image_folder}" in config
        assert f"{int(found['parameters']):,} parameters" in (folder / "log.txt").read_text()
    assert "layer_offset: 0" in config
    assert "num_directions: 1" in config
    assert str(image_folder) not in results.read_text()

    before = results.read_bytes()
    assert main(command) == 0
    assert "2 runs, 2 done before" in capsys.readouterr().out
    assert results.read_bytes() == before
    assert not list(tmp_path.rglob("version_1"))

    report = ["study", "report", f"--results={results}", f"--plot={tmp_path / 'study.png'}"]
    assert main(report) == 0
    assert f"| 2d | {int(rows['2d']['parameters']):,} | 1 | {100 * float(rows['2d']['top1']):.2f}" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Runs that are a script of their own; its first argument is the folder."""
    (tmp_path / "run.py").write_text(script)
    command = property(lambda self: [str(tmp_path / "run.py"), str(self.folder), self.network, str(self.seed)])
    monkeypatch.setattr(study.Run, "command", command)
    monkeypatch.setattr(study.subprocess, "Popen", lambda args, **rest: POPEN([sys.executable, *args[3:]], **rest))
    monkeypatch.setattr(study, "_row", lambda run, seconds: row(run.network, run.seed, 0.5, run.dataset))


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    fake(monkeypatch, tmp_path, "import sys\nif sys.argv[2:] == ['1d', '1']: sys.exit('no memory')")
    configs = [str(CONFIGS / name) for name in ("study_textures.yaml", "study_fashion_mnist.yaml")]
    command = ["study", "run", *configs, "--seeds", "0", "1", "--folder", str(tmp_path), "--networks", "1d", "2d"]
    command += ["--results", str(tmp_path / "study.csv")]
    assert main(command) == 1
    printed = capsys.readouterr().out
    for dataset in ("textures", "fashion_mnist"):
        assert f"{dataset}, 1d, seed 1: failed: no memory ({tmp_path}/{dataset}/1d/seed1/log.txt)" in printed
    assert "6 of 8 runs done, 2 failed" in printed
    assert len(rows_of(tmp_path / "study.csv")) == 6
    fake(monkeypatch, tmp_path, "")
    assert main(command) == 0
    assert "8 runs, 6 done before" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "study.csv")) == 8


def test_the_time_limit_ends_what_runs_and_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    script = """
import signal, sys, time
from pathlib import Path
if sys.argv[2] == "2d":
    sys.exit()
def stop(*args):
    (Path(sys.argv[1]) / "told").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(Path(sys.argv[1]) / "started").touch()
time.sleep(60)
"""
    fake(monkeypatch, tmp_path, script)
    command = ["study", "run", str(CONFIGS / "study_textures.yaml"), "--folder", str(tmp_path), "--minutes", "0.05"]
    command += ["--results", str(tmp_path / "study.csv"), "--networks", "2d", "1d", "--seeds", "0", "--jobs", "1"]
    assert main(command) == 1
    assert "1 of 2 runs done, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "textures" / "1d" / "seed0" / "started").exists()
    assert (tmp_path / "textures" / "1d" / "seed0" / "told").exists()
    assert [r["network"] for r in rows_of(tmp_path / "study.csv")] == ["2d"]


def test_commands_of_the_36_runs():
    options = study._parser().parse_args(["run", "a/study_x.yaml", "b/y.yaml", "--root", "y=data"])
    options.configs = [CONFIGS / "study_textures.yaml", CONFIGS / "quickstart.yaml"]
    options.root = ["quickstart=data"]
    runs = study._runs(options, ["--model.lr=1"])
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == 36
    assert {run.seed for run in runs[:12]} == {0}
    assert runs[-1].command == [
        "fit", f"--config={CONFIGS / 'quickstart.yaml'}", "--model.network=convnext_atto_1d",
        "--model.network_args.num_directions=1", "--model.network_args.layer_offset=0", "--seed_everything=2",
        "--data.seed=2", "--trainer.default_root_dir=runs/study/quickstart/1d_horizontal/seed2", "--data.root=data",
        "--model.lr=1",
    ]  # fmt: skip
    assert not any(option.startswith("--data.root") for option in runs[0].command)


def test_the_final_accuracy_is_that_after_the_last_epoch(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,step,val/top1\n0,9,0.9\n1,19,0.4\n1,20,\n")
    assert study.final_top1(metrics) == (2, 0.4)
    metrics.write_text("epoch,step,val/top1\n0,9,0.9\n1,19,\n")
    with pytest.raises(UserError, match=r"expected val/top1 after the last epoch \(1\): trainer.max_epochs must be"):
        study.final_top1(metrics)


def test_means_deviations_and_differences():
    found = {(s.dataset, s.network): s for s in study.summaries(ROWS)}
    assert list(found) == [("clothes", "1d"), ("textures", "2d"), ("textures", "1d horizontal")]
    two, one = found["textures", "2d"], found["textures", "1d horizontal"]
    assert (two.mean, two.deviation) == pytest.approx((82.0, 2.0))
    assert (one.mean, one.deviation) == pytest.approx((71.5, math.sqrt(4.5)))
    assert one.standard_error(two) == pytest.approx(math.sqrt(4 / 3 + 4.5 / 2))
    assert math.isnan(found["clothes", "1d"].deviation)


def test_report(results, tmp_path, capsys):
    document = tmp_path / "study.md"
    document.write_text(f"before\n{study._BEGIN}\nold\n{study._END}\nafter\n")
    assert main(["study", "report", f"--results={results}", f"--document={document}"]) == 0
    table = """
**clothes**: 40 epochs; A GPU, torch 9.9, 2026-01-02.
Further options: `--model.lr 1`.

| network | parameters | runs | top-1, mean ± standard deviation | minus 2d |
|---|---|---|---|---|
| 1d | 1,234,567 | 1 | 91.50 |  |

**textures**: 40 epochs; A GPU, torch 9.9, 2026-01-02.

| network | parameters | runs | top-1, mean ± standard deviation | minus 2d |
|---|---|---|---|---|
| 2d | 1,234,567 | 3 | 82.00 ± 2.00 |  |
| 1d horizontal | 1,234,567 | 2 | 71.50 ± 2.12 | -10.50 ± 1.89 |
"""
    assert document.read_text() == f"before\n{study._BEGIN}\n{table}\n{study._END}\nafter\n"
    assert table.strip() in capsys.readouterr().out


def test_figure_shows_every_run(results):
    panels = study.figure(list(study.read_rows(results).values())).axes
    assert [panel.get_title() for panel in panels] == ["clothes", "textures"]
    points = [list(line.get_ydata()) for line in panels[1].lines if len(line.get_ydata()) in (2, 3)]
    assert pytest.approx([80.0, 82.0, 84.0]) in points
    assert pytest.approx([70.0, 73.0]) in points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no.yaml"], "CONFIG: expected a file, got no.yaml, which does not exist"),
        (["run", str(CONFIGS / "study_textures.yaml"), "--jobs=0"], "--jobs: expected at least 1, got 0"),
        (
            ["run", str(CONFIGS / "study_textures.yaml"), "--root=texture=data"],
            "--root: expected one of textures, then = and a folder, got texture=data",
        ),
        (["report"], "with nothing in it"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, arguments, message):
    assert main(["study", *arguments, f"--results={tmp_path / 'study.csv'}"]) == 1
    assert message in capsys.readouterr().err


def test_other_files_are_not_overwritten(results, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["study", "report", f"--results={tmp_path / 'other.csv'}"]) == 1
    assert "--results: expected a file of oriented1d study, got" in capsys.readouterr().err
    (tmp_path / "other.md").write_text("no marks")
    assert main(["study", "report", f"--results={results}", f"--document={tmp_path / 'other.md'}"]) == 1
    assert "--document: expected the marks" in capsys.readouterr().err
    assert (tmp_path / "other.md").read_text() == "no marks"


def test_the_documentation_has_a_place_for_the_report(results, tmp_path):
    document = Path(__file__).resolve().parents[2] / "docs" / "study.md"
    (tmp_path / "study.md").write_text(document.read_text())
    study.write_into(tmp_path / "study.md", "THE TABLE")
    assert "THE TABLE" in (tmp_path / "study.md").read_text()
    assert all(network in document.read_text() for network in study.NETWORKS)
