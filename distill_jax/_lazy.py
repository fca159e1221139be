"""Modules that are imported when they are first named, so that importing a package costs nothing."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, names: Sequence[str], functions: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: the package's `__name__`.
        names: of its modules and functions.
        functions: the modules that define its functions.
    """
    functions = functions or {}

    def getattribute(name: str) -> Any:
        if name in functions:
            return getattr(importlib.import_module(f"{package}.{functions[name]}"), name)
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def directory() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *names})

    return getattribute, directory
