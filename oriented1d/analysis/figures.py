"""What all figures share: how they are written, and colours that stay apart in grey and for colour-blind readers."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from oriented1d.files import unfinished

# Okabe and Ito's colours, in an order in which neighbours also differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def save(figure: Figure, output: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all, as any file type that matplotlib writes (by the name's ending).

    ``matplotlib.figure.Figure`` objects made directly, without pyplot, need no display.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as partial:
        figure.savefig(partial, dpi=130)
