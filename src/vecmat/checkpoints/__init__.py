"""Checkpoints that people have, read into ``vecmat.Linear``s, and vecmat's own, written."""
