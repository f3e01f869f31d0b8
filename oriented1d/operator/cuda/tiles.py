"""What one thread computes: a tile of output pixels along the kernel's own line, and the input pixels they share.

A kernel of 31 taps reads 31 pixels for one output. Fourteen outputs that follow each other along the line of the kernel
read, all together, only about 60 different pixels: each is loaded once and used for every output and tap that needs it.

Coordinates here are ``u`` along the tile and ``v`` across it: ``(u, v)`` is ``(x, y)``, or ``(y, x)`` for the steep
angles. The line of a kernel is followed in whole pixels by ``drift(u)``, which repeats itself (but for a constant) from
tile to tile, so that the same offsets serve every tile.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

Uses = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Outputs of a thread and the input pixels that they need, relative to the tile's origin.

    Output ``i`` lies at ``u = i``, ``v = drift(i)`` of the output grid.

    Attributes:
        steep: ``u`` runs down the columns of the image rather than along its rows.
        length: number of outputs.
        advance, phase: the drift.
        pixels: ``(u, v, uses)`` of each input pixel, on the input grid, where ``uses`` lists pairs ``(i, d)``: output
            ``i`` takes the pixel with the distinct tap ``d``.
    """

    steep: bool
    length: int
    advance: int
    phase: int
    pixels: tuple[tuple[int, int, Uses], ...]

    def drift(self, u: int) -> int:
        """How far the line has moved across at ``u``: ``floor((u * advance + phase) / length)``."""
        return (u * self.advance + self.phase) // self.length

    @property
    def outputs(self) -> tuple[tuple[int, int], ...]:
        """``(u, v)`` of each output."""
        return tuple((i, self.drift(i)) for i in range(self.length))


def is_steep(angle: float) -> bool:
    return abs(math.sin(angle)) > abs(math.cos(angle)) * 0.999


def make_tile(angle: float, taps: np.ndarray, step: int, length: int) -> Tile:
    """The tile of ``length`` outputs that needs the fewest input pixels for the distinct ``taps`` ``(D, 2)``.

    ``step`` is the distance in input pixels between neighbouring outputs. ``taps`` are ``(dy, dx)``.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    steep = is_steep(angle)
    advance = round(length * (-cosine / sine if steep else -sine / cosine))
    best: dict[tuple[int, int], list[tuple[int, int]]] | None = None
    best_phase = 0
    for phase in range(length):
        uses: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i in range(length):
            across = (i * advance + phase) // length
            for d, (dy, dx) in enumerate(taps.tolist()):
                du, dv = (dy, dx) if steep else (dx, dy)
                uses.setdefault((i * step + du, across * step + dv), []).append((i, d))
        if best is None or len(uses) < len(best):
            best, best_phase = uses, phase
    assert best is not None
    pixels = tuple((u, v, tuple(best[u, v])) for u, v in sorted(best, key=lambda p: (p[1], p[0])))
    return Tile(steep, length, advance, best_phase, pixels)
