"""The command line: help, delegation, and one clear line for everything that can be wrong with the input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

import oriented1d
from oriented1d.cli import main, one_line
from oriented1d.training.command import plain
from oriented1d.training.errors import UserError
from tests.classification.conftest import image_folder, options, write_images  # noqa: F401


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error that was printed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def test_help_and_version(capsys):
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        for command in ("fit", "validate", "predict", "convert", "benchmark", "draw"):
            assert f"\n  {command}" in printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"oriented1d {oriented1d.__version__}\n"


def test_help_does_not_import_lightning():
    code = "import sys, oriented1d.cli; oriented1d.cli.main(['--help']); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_help_of_a_command(capsys):
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    assert main(["convert", "--help"]) == 0
    assert "--to {backbone,safetensors}" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["train"]) == 2
    commands = "fit, validate, predict, shards, convert, info, draw, erf, export, benchmark, study, doctor"
    assert f"expected a command ({commands}), got train" in error_of(capsys)


def test_missing_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("oriented1d.training.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert main(["fit"]) == 1
    assert error_of(capsys).endswith("lightning, which is not installed: pip install 'oriented1d[train]'")


def test_convert(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no.pth"), str(tmp_path / "out.pth")]) == 1
    assert error_of(capsys).startswith(f"oriented1d convert: error: {tmp_path / 'no.pth'}: no such")
    small = timm.create_model("convnext_atto_2d", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=2)
    torch.save({"model": small.state_dict()}, tmp_path / "in.pth")
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--to", "safetensors"]) == 0
    assert f"wrote {tmp_path / 'out.safetensors'}" in capsys.readouterr().out
    assert (tmp_path / "out.safetensors").is_file()
    assert main(["convert", "only-one-argument"]) == 2


@pytest.mark.parametrize("command", ["benchmark", "draw"])
def test_commands_of_the_analysis_get_their_arguments(monkeypatch, command):
    module, seen = ModuleType(command), []
    module.main = lambda arguments: seen.append(arguments) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"oriented1d.analysis.{command}", module)
    assert main([command, "operator", "--help"]) == 7
    assert seen == [["operator", "--help"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num_clases=3"], "Option 'num_clases' is not accepted; did you mean num_classes?"),
        (["--data.root_folder=x"], "'oriented1d.classification.ImageData': Option 'root_folder' is not accepted"),
        (["--trainer.max_epoch=3"], "--trainer.max_epoch=3; did you mean max_epochs?"),
        (["--model.lr=fast"], "Parser key \"lr\": Expected a <class 'float'>. Got value: fast"),
        (["--model.ema_decay=high"], "Parser key \"ema_decay\": Expected a <class 'float'>. Given value: high"),
        (["--trainer.max_epochs=x"], "Parser key \"trainer.max_epochs\": Expected a <class 'int'>. Given value: x"),
        (["--threads=0"], 'Parser key "threads": Not of type PositiveInt'),
        (["--model.network=convnext_tinny_1d"], "model.network: cannot make convnext_tinny_1d with {"),
        (["--model.network_args.wide=2"], "'wide': 2}: "),
        (["--model.num_classes=4"], "model.num_classes: expected 3, the number of classes of the data, got 4"),
        (["--model.pretrained=no.pth"], "model.pretrained: no.pth: no such checkpoint file"),
        (["--data.root=nowhere"], "data.root: expected the folder of the train images, but there is no folder nowhere"),
        (["--data.root=null"], "data.root: expected the folder of the data set, got none"),
        (["--data.batch_size=7", "--data.total_batch_size=7"], "data.batch_size: mixup and cutmix need an even number"),
        (["--data.total_batch_size=20"], "batch_size x devices x nodes = 8 x 1 = 8, got 20"),
        (["--data.total_batch_size=64"], "expected at most the 48 training samples, got 64"),
        (["--trainer.precision=bf16-true"], "trainer.precision: a moving average needs float32 weights"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs: the schedule needs an end"),
        (["--ckpt_path=no.ckpt"], "ckpt_path: expected a checkpoint file, got no.ckpt, which does not exist"),
    ],
)
def test_bad_input_of_fit(options, tmp_path, capsys, arguments, message):  # noqa: F811
    assert main(["fit", *options, *arguments]) == 1
    assert message in error_of(capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_misspelled_key_in_a_configuration(options, capsys):  # noqa: F811
    config = Path(options[1])
    text = config.read_text()
    config.write_text(text.replace("warmup_epochs", "warmup_epoch"))
    assert main(["fit", *options]) == 1
    assert "Option 'warmup_epoch' is not accepted; did you mean warmup_epochs?" in error_of(capsys)
    config.write_text(text.replace("max_epochs", "max_epoch"))
    assert main(["fit", *options]) == 1
    assert "does not accept option 'trainer.max_epoch'; did you mean max_epochs?" in error_of(capsys)
    config.write_text(text.replace("ImageClassifier", "ImageClasifier"))
    assert main(["fit", *options]) == 1
    assert "has no attribute 'ImageClasifier'" in error_of(capsys)


def test_missing_configuration(capsys):
    assert main(["fit"]) == 1
    assert "give them with --config FILE" in error_of(capsys)
    assert main(["fit", "--config", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in error_of(capsys)


def test_empty_folders_and_differing_classes(options, tmp_path, capsys):  # noqa: F811
    root = tmp_path / "data"
    (root / "train" / "a").mkdir(parents=True)
    assert main(["fit", *options, f"--data.root={root}"]) == 1
    assert f"data.root: Found 0 images in subfolders of {root / 'train'}" in error_of(capsys)
    write_images(root / "train", 16, seed=0)
    write_images(root / "val", 2, seed=0)
    (root / "val" / "green").rename(root / "val" / "grey")
    assert main(["fit", *options, f"--data.root={root}"]) == 1
    assert "expected the 3 classes of train in val too, got 3; in one of the two only: green, grey" in error_of(capsys)


def test_folder_that_cannot_be_written(options, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    assert main(["fit", *options, f"--trainer.default_root_dir={tmp_path}/file/runs"]) == 1
    assert "trainer.default_root_dir: expected a folder that can be written to" in error_of(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(options, tmp_path, capsys):  # noqa: F811
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["fit", *options, f"--trainer.default_root_dir={tmp_path}/closed"]) == 1
    assert "(Permission denied)" in error_of(capsys)


def test_traceback_is_shown_on_request(options, monkeypatch):  # noqa: F811
    with pytest.raises(UserError):
        main(["fit", *options, "--data.root=nowhere", "--traceback"])
    monkeypatch.setenv("ORIENTED1D_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["fit", *options, "--data.root=nowhere"])


def test_one_line():
    assert one_line(UserError("this is\n  wrong")) == "this is wrong"
    assert one_line(KeyError("x")) == "KeyError: 'x' (--traceback shows where)"
    message = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  x\na.b.UserError: bad: file\n"
    assert one_line(UserError(message)) == "bad: file"


def test_messages_of_other_versions_of_jsonargparse_are_kept():
    assert plain("unknown\n  layout") == "unknown layout"
