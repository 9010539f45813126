"""Which of a module's children are given the same tensor, read from the code of its ``forward``.

Nothing is run, and the source must be that of the code. What is proved is simple: within one block of statements,
calls ``self.a(x)``, ``self.b(x)`` of the same local name, each the only call of that child, none of them under a
condition or in a loop of its own, and between the first and the last nothing but calls of linear layers uses x (its
``shape``, ``dtype`` and ``device`` may be read).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import linecache
from collections.abc import Iterator

_READ_ONLY = {"shape", "dtype", "device", "ndim"}
# What is inside one of these is run later, several times or perhaps not at all.
_UNSURE = (
    ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.FunctionDef,
    ast.AsyncFunctionDef, ast.ClassDef, ast.NamedExpr, ast.Compare,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Siblings:
    """groups: names of children that are given the same tensor, in the order of the calls. apart: the others, why."""

    groups: tuple[tuple[str, ...], ...]
    apart: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call ``self.child(argument)``. argument: a local name, None for anything else.

    block: the statements that it is surely run among; place: which of them it is in, and where in the text.
    """

    child: str
    argument: str | None
    block: int
    place: tuple[int, int, int]
    sure: bool


def siblings(cls: type, children: set[str], harmless: set[str] | None = None) -> Siblings:
    """The Siblings among the named children of a module class, by its ``forward``.

    harmless: other children that do nothing to what they are given.
    """
    parsed = _source(cls)
    if parsed is None or not parsed.args.args:
        return Siblings(groups=(), apart=dict.fromkeys(children, f"the code of {cls.__name__}.forward cannot be read"))
    me = parsed.args.args[0].arg
    blocks: list[list[ast.stmt]] = []
    calls = [call for call in _calls(parsed.body, me, blocks) if call.child in children]
    apart: dict[str, str] = {}
    once: list[_Call] = []
    for child in children:
        mine = [call for call in calls if call.child == child]
        if not mine:
            apart[child] = f"{cls.__name__}.forward does not call it as self.{child}(...)"
        elif len(mine) > 1:
            apart[child] = f"{cls.__name__}.forward calls it in {len(mine)} places"
        elif mine[0].argument is None:
            apart[child] = "what it is given has no name"
        elif not mine[0].sure:
            apart[child] = f"{cls.__name__}.forward calls it under a condition, or perhaps several times"
        else:
            once += mine
    groups: dict[tuple[int, str | None], list[_Call]] = {}
    for call in sorted(once, key=lambda call: call.place):
        groups.setdefault((call.block, call.argument), []).append(call)
    found = []
    for (block, argument), together in groups.items():
        names = tuple(call.child for call in together)
        why = f"nothing else is given the same {argument}" if len(names) < 2 else None
        why = why or _used(blocks[block], argument, together, me, children | (harmless or set()))
        if why is None:
            found.append(names)
        else:
            apart |= dict.fromkeys(names, why)
    return Siblings(groups=tuple(found), apart=apart)


def _source(cls: type) -> ast.FunctionDef | None:
    """The syntax of a class's ``forward``, below its decorators; None where it is not that of the code that runs.

    The file may have been changed since it was imported, or never have held the function: so it is compiled, and must
    hold the very instructions.
    """
    function = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        held = [compile(text, code.co_filename, "exec", dont_inherit=True)]
        for each in held:  # grows
            held += [part for part in each.co_consts if inspect.iscode(part)]
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    if code not in held:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and code.co_firstlineno in (
            node.lineno, *(decorator.lineno for decorator in node.decorator_list[:1])
        ):  # fmt: skip
            return node
    return None


def _calls(body: list[ast.stmt], me: str, blocks: list[list[ast.stmt]]) -> Iterator[_Call]:
    """The calls in a block and in the blocks inside it. blocks: collects them."""
    block = len(blocks)
    blocks.append(body)
    for index, statement in enumerate(body):
        inner = [
            part for _, part in ast.iter_fields(statement) if isinstance(part, list) and part and _is_block(part[0])
        ]
        for part in inner:
            for nested in part:  # a handler's or a case's own statements, or the statements themselves
                if not isinstance(nested, ast.stmt):
                    yield from _calls(nested.body, me, blocks)
            if isinstance(part[0], ast.stmt):
                yield from _calls(part, me, blocks)
        whole = isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return))
        for node, sure in _expressions(statement, whole):
            child = _child(node, me)
            if child is not None:
                assert isinstance(node, ast.Call)
                plain = len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name)
                argument = node.args[0].id if plain and isinstance(node.args[0], ast.Name) else None
                place = index, node.end_lineno or 0, node.end_col_offset or 0
                yield _Call(child=child, argument=argument, block=block, place=place, sure=sure)


def _is_block(part: object) -> bool:
    return isinstance(part, (ast.stmt, ast.ExceptHandler, ast.match_case))


def _expressions(node: ast.AST, sure: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node of a statement but its blocks, and whether it is surely evaluated, once."""
    for part in ast.iter_child_nodes(node):
        if not _is_block(part):
            certain = sure and not isinstance(part, _UNSURE)
            yield part, certain
            yield from _expressions(part, certain)


def _child(node: ast.AST, me: str) -> str | None:
    """The name of the child that an expression calls, ``self.name(...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return node.func.attr if isinstance(owner, ast.Name) and owner.id == me else None
    return None


def _used(body: list[ast.stmt], argument: str | None, together: list[_Call], me: str, harmless: set[str]) -> str | None:
    """What else happens to the argument from the first call to the last; None for nothing."""
    first, last = together[0].place[0], together[-1].place[0]
    for index in range(first, last + 1):
        statement = body[index]
        allowed = set()
        for node in ast.walk(statement):
            if _child(node, me) in harmless:
                assert isinstance(node, ast.Call)
                allowed |= {id(given) for given in node.args}
            elif isinstance(node, ast.Attribute) and node.attr in _READ_ONLY:
                allowed.add(id(node.value))
        if index == last and isinstance(statement, ast.Assign):  # a name is bound after the right side is computed
            allowed |= {id(target) for target in statement.targets}
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == argument and id(node) not in allowed:
                return f"between the calls the code uses {argument} for something else"
    return None
