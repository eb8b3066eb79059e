"""Import optional packages; one that is missing and one that is broken are told apart."""

from importlib import import_module
from typing import Any

from diagnostics.errors import BrokenPackage, MissingPackage


def load_package(
    module: str, purpose: str, extra: str, package: str = "", otherwise: str = ""
) -> Any:
    """Import a module of an optional package.

    Args:
      module: full name. purpose: who needs it, the beginning of the message. extra: of opdlab, that
        installs it. package: top-level name of the package, if not that of the module. otherwise:
        what else the user may do, after "or".

    Raises:
      MissingPackage: the package is not installed; names the extra.
      BrokenPackage: it is installed and cannot be imported; says why.
    """
    package = package or module.partition(".")[0]
    choice = f", or {otherwise}" if otherwise else ""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise MissingPackage(
                f"{purpose} needs {package}: pip install 'opdlab[{extra}]'{choice}"
            ) from error
        cause: Exception = error
    except Exception as error:  # a package may fail in any way while it is imported
        cause = error
    raise BrokenPackage(
        f"{purpose} needs {package}, which is installed and cannot be imported "
        f"({type(cause).__name__}: {cause}); install it anew: pip install --force-reinstall "
        f"'opdlab[{extra}]'{choice}"
    ) from cause
