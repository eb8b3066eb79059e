"""Names that a package exports and imports only when they are used (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from diagnostics.io.packages import explain_missing_packages


def lazy_names(
    package: str, modules: Mapping[str, str], extra: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions `__getattr__` and `__dir__` of a package.

    Args:
        package: Name of the package.
        modules: Exported name to the module that defines it.
        extra: Extra of opdlab that installs what these modules import.

    Returns:
        The two functions.
    """

    def get_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with explain_missing_packages(f"{package}.{name}", extra):
            return getattr(import_module(modules[name]), name)

    def list_names() -> list[str]:
        return sorted(modules)

    return get_name, list_names
