"""Shapes that all engines are given: those of `gptq bench --synthetic`."""

from typing import NamedTuple


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads


SHAPES = {
    "135m": Shape(576, 1536, 30, 9, 3, 49152, True),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000, False),
}
