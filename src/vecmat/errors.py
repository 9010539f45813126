"""What can go wrong, and what it is called.

Three kinds. A caller's mistake raises ``ValueError`` or ``TypeError`` and never falls back. "This kernel cannot" is a
returned sentence, not an exception. A fault of the device propagates as torch raised it.
"""

from __future__ import annotations


class VecmatWarning(UserWarning):
    """Something was set aside or replaced, the result is still right: a table ignored, a kernel demoted."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, hostile, or of a kind that is not read; the message names the file."""


class TableMissError(LookupError):
    """No table has a row for this problem under ``settings(on_miss="error")``; the message shows the nearest rows."""


class NoKernelError(RuntimeError):
    """No kernel may run this problem under ``settings(strict=True)``; the message lists every kernel's reason."""
