"""The quick start, as the README has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from oriented1d.classification import Digits
from oriented1d.cli import main
from oriented1d.training.command import Command

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "classification" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The configuration sets the number of threads, for this process too."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy_and_its_checkpoint_does_too(tmp_path):
    assert main(["fit", "--config", str(CONFIG), f"--trainer.default_root_dir={tmp_path}"]) == 0
    run = tmp_path / "version_0"
    assert torch.get_num_threads() == 1
    picture = (run / "kernels.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000

    best = run / "checkpoints" / "best.ckpt"
    metrics = Command(["validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={best}"]).trainer.callback_metrics
    assert float(metrics["val/top1"]) >= 0.97

    # A held-out digit, enlarged and saved as an image, gets its name from the command.
    data = Digits(image_size=32, crop_pct=1.0)
    digits = data.create_split(training=False)
    for i in range(20):
        image = digits.pixels[i]  # type: ignore[attr-defined]
        path = tmp_path / "images" / f"{i:02d}_{digits.labels[i]}.png"  # type: ignore[attr-defined]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    arguments = [f"--config={run / 'config.yaml'}", f"--ckpt_path={best}", f"--data.images={tmp_path / 'images'}"]
    assert main(["predict", *arguments, f"--model.predictions={tmp_path / 'out.csv'}"]) == 0
    rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
    right = sum(Path(row.split(",")[0]).stem[-1] == row.split(",")[1] for row in rows)
    assert len(rows) == 20
    assert right >= 18
    assert torch.load(best, weights_only=True)["class_names"] == [str(digit) for digit in range(10)]
