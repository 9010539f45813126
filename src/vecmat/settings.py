"""Settings: one frozen value, changed for a block of code by a context manager."""

from __future__ import annotations

import dataclasses
import math
from contextvars import ContextVar, Token
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that changes how a kernel is chosen, and nothing that changes what is computed.

    strict: raise ``NoKernelError`` where only the fallback kernel is left, instead of running it.
    tune: "off", or "on_miss" to tune a problem that no table has when it is first met (``vecmat.tuning`` sets it).
    deadline: the ``time.monotonic()`` after which nothing more is tuned.
    on_miss: "estimate" takes the lowest estimate where no table has a row; "error" raises ``TableMissError``.
    overlay: a ``table.Table`` asked before the user's and the shipped one (``vecmat.tables.use`` sets it).
    """

    strict: bool = False
    tune: str = "off"
    deadline: float = math.inf
    on_miss: str = "estimate"
    overlay: Any = None

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "strict": (True, False), "tune": ("off", "on_miss"), "on_miss": ("estimate", "error"),
        }  # fmt: skip
        for name, values in allowed.items():
            value = getattr(self, name)
            if not any(value is known or (isinstance(value, str) and value == known) for known in values):
                kind = TypeError if name == "strict" else ValueError
                raise kind(f"settings: {name} is {value!r}; expected {' or '.join(map(repr, values))}")


class Scope:
    """Settings and the plans chosen under them, so that the warm path is one context lookup and one dict lookup.

    epoch: another object whenever plans are forgotten; who keeps something made of a plan keeps the epoch beside it.
    """

    __slots__ = ("epoch", "plans", "settings")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plans: dict[Any, Any] = {}
        self.epoch = object()


_SCOPES: dict[Settings, Scope] = {Settings(): Scope(Settings())}
_MOST_SCOPES = 64
_SCOPE: ContextVar[Scope] = ContextVar("vecmat.scope", default=_SCOPES[Settings()])

scope = _SCOPE.get


def forget_plans() -> None:
    """Drop every memoised plan; the next call of each problem chooses again (after a table changed, say)."""
    for known in list(_SCOPES.values()):
        known.plans.clear()
        known.epoch = object()


class settings:
    """Context manager that changes settings for the code inside it, in this thread or task only.

    >>> with vecmat.settings(strict=True):
    ...     y = vecmat.matmul(x, weight)

    Raises ``TypeError`` for a setting that does not exist.
    """

    def __init__(self, **changes: Any) -> None:
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in changes:
            if name not in known:
                raise TypeError(f"settings: there is no setting {name!r}; the settings are {', '.join(known)}")
        Settings(**changes)  # refuses wrong values here, not at the with statement
        self._changes = changes
        self._tokens: list[Token[Scope]] = []

    @staticmethod
    def current() -> Settings:
        """The settings in force here."""
        return scope().settings

    def __enter__(self) -> Settings:
        value = dataclasses.replace(scope().settings, **self._changes)
        found = _SCOPES.get(value)
        if found is None:  # other threads may be here, too: nothing is taken for granted between two steps
            while len(_SCOPES) >= _MOST_SCOPES:  # overlays come and go; the default scope, first in, stays
                _SCOPES.pop(list(_SCOPES)[1], None)
            found = _SCOPES.setdefault(value, Scope(value))
        self._tokens.append(_SCOPE.set(found))
        return value

    def __exit__(self, *exc: object) -> None:
        _SCOPE.reset(self._tokens.pop())
