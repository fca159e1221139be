"""Long lists of positional arguments are misread: all beyond five are given by keyword."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("distill_jax", "experiments", "launch")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MOST = 5


def positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names that may be given by position, without `self` and `cls`."""
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def too_long(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name}({', '.join(positional(node))})"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(positional(node)) > MOST
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_at_most_five_positional_parameters(path):
    assert too_long(path.read_text()) == []


def test_what_is_counted():
    assert too_long("def f(a, b, c, d, e, *, f): ...") == []
    assert too_long("class A:\n  def f(self, a, b, c, d, e): ...") == []
    assert too_long("class A:\n  def f(self, a, b, /, c, d, e): ...") == []
    assert too_long("def f(a, b, c, d, e, f): ...") == ["line 1: f(a, b, c, d, e, f)"]
    assert too_long("async def f(a, b, /, c, d, e, f): ...") == ["line 1: f(a, b, c, d, e, f)"]
