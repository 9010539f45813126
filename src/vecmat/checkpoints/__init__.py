"""Checkpoints that people have, read into ``vecmat.Linear``s, and vecmat's own, written.

What each format becomes, and whether exactly, is in docs/checkpoints.md.
"""

from .loading import load
from .quantization import Quantization

__all__ = ["Quantization", "load"]
