"""Checkpoints that people have, read into ``vecmat.Linear``s, and vecmat's own, written: ``load`` and ``convert``.

What each format becomes, and whether exactly, is in docs/checkpoints.md.
"""

from .loading import load
from .quantization import Quantization
from .saving import Converted, convert

__all__ = ["Converted", "Quantization", "convert", "load"]
