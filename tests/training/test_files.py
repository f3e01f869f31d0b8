from pathlib import Path

import pytest

from oriented1d.training.errors import UserError
from oriented1d.training.files import find_images


def test_find_images(tmp_path: Path):
    for name in ("b.JPEG", "a.png", "sub/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([str(tmp_path), str(tmp_path / "notes.txt")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.png", "b.JPEG", "sub/c.jpg", "notes.txt"]
    with pytest.raises(UserError, match=r"data\.images: no image files in"):
        find_images([])
