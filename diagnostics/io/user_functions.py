"""Functions of the user's own, named as MODULE:FUNCTION or FILE.py:FUNCTION."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile

REMEDY = "write MODULE:FUNCTION, of a module that Python finds from here, or FILE.py:FUNCTION"


def is_function_name(name: str) -> bool:
    """Return whether a name is that of a function, whose code would run."""
    return ":" in name


def load_function(name: str, kind: str) -> Callable[..., Any]:
    """Import the function that a name refers to; modules in the working directory are found too.

    Args:
        name: MODULE:FUNCTION or FILE.py:FUNCTION.
        kind: What the function is for, such as "metric", for messages.

    Returns:
        The function.

    Raises:
        InvalidInput: The name has another form, its module cannot be imported, or has no such
            function.
        MissingFile: FILE.py does not exist.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise InvalidInput(f"the {kind} {name!r} is no name of a function; {REMEDY}")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise MissingFile(f"the {kind} {name} names a file that does not exist: {module_name}")
    if str(Path.cwd()) not in sys.path:  # last, so that no folder there hides an installed package
        sys.path.append(str(Path.cwd()))
    try:
        module = _import(module_name)
    except Exception as error:  # a user's module can raise anything
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"the {kind} {name} cannot be imported ({type(error).__name__}: {reason}); {REMEDY}"
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        known = [x for x, value in vars(module).items() if inspect.isfunction(value)]
        raise InvalidInput(
            f"the {kind} {name}: {module_name} has no function {function_name!r}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return function


def _import(module_name: str) -> ModuleType:
    """Import a module by name, or a file under a name that hides no other module."""
    if not module_name.endswith(".py"):
        return importlib.import_module(module_name)
    path = Path(module_name).resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{module_name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_arguments(function: Callable[..., Any], name: str, kind: str, *arguments: str) -> None:
    """Refuse a function that cannot be called with these positional arguments.

    Args:
        function: The function.
        name: Its name, for the message.
        kind: What it is for, for the message.
        *arguments: Names of the arguments, for the message.

    Raises:
        InvalidInput: It needs others.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InvalidInput(
            f"the {kind} {name} takes {signature}, but is called with "
            f"({', '.join(arguments)}) ({error}); change its parameters"
        ) from error
