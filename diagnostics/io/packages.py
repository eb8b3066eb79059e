"""Import of optional packages, with different errors for a missing and a broken package."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from diagnostics.errors import BrokenPackage, MissingPackage

OPTIONAL_PACKAGES = frozenset(
    [
        *("transformers", "tokenizers", "huggingface_hub", "tyro", "tqdm", "httpx2", "scipy"),
        *("joblib", "pandas", "matplotlib"),
    ]
)
"""Packages of the extras train, study and figures, which modules import by their own names."""


@contextmanager
def explain_missing_packages(purpose: str, extra: str) -> Iterator[None]:
    """Raise an error that names the extra where a module of ours imports a missing package.

    Args:
        purpose: What needs the package; the beginning of the message.
        extra: Extra of opdlab that installs it.

    Yields:
        Nothing.

    Raises:
        MissingPackage: A package of OPTIONAL_PACKAGES is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        raise MissingPackage(
            f"{purpose} needs {error.name}: pip install 'opdlab[{extra}]'"
        ) from error


def load_package(
    module: str, purpose: str, extra: str, package: str = "", alternative: str = ""
) -> Any:
    """Import a module of an optional package.

    Args:
        module: Full name of the module.
        purpose: What needs the package; the beginning of the message.
        extra: Extra of opdlab that installs it.
        package: Top-level package, if it is not that of the module.
        alternative: What else the user may do, after "or".

    Returns:
        The module.

    Raises:
        MissingPackage: The package is not installed; names the extra.
        BrokenPackage: It is installed but cannot be imported; says why.
    """
    package = package or module.partition(".")[0]
    alternative_text = f", or {alternative}" if alternative else ""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise MissingPackage(
                f"{purpose} needs {package}: pip install 'opdlab[{extra}]'{alternative_text}"
            ) from error
        cause: Exception = error
    except Exception as error:  # importing a package may raise anything
        cause = error
    raise BrokenPackage(
        f"{purpose} needs {package}, which is installed but cannot be imported "
        f"({type(cause).__name__}: {cause}); reinstall it: pip install --force-reinstall "
        f"'opdlab[{extra}]'{alternative_text}"
    ) from cause
