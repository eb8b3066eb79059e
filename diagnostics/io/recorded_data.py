"""The recorded tables of `figures`: package data, which is updated in a checkout only."""

from importlib import resources
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.io.provenance import ROOT


def recorded_data() -> Path:
    """Return the folder of the recorded tables, wherever the package `figures` is installed."""
    return Path(str(resources.files("figures") / "data"))


def writable_data(folder: Path | None, option: str) -> Path:
    """Return the folder in which a command saves recorded tables.

    Args:
        folder: The folder that the user named, or None.
        option: The option that asked for the update, for the message.

    Returns:
        The named folder, which is made if it is missing, or the recorded tables of a checkout.

    Raises:
        InvalidInput: No folder is named and the package is installed, not run from a checkout.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if not (ROOT / "pyproject.toml").is_file():
        raise InvalidInput(
            f"{option} saves tables in figures/data of a checkout, but opdlab is installed in "
            f"{ROOT}, where nothing is written; add --data-folder with a folder of your own"
        )
    return recorded_data()
