"""Models and data in memory, in the place of those that the settings name."""

from collections.abc import Iterable, Mapping
from typing import Any

from diagnostics.errors import InvalidInput
from opd.config.settings import Config, with_settings
from opd.data.row_files import rows_of_object
from opd.teachers.factory import ModelObjects


def with_objects(
    config: Config,
    objects: ModelObjects,
    dataset: Iterable[Mapping[str, Any]] | None,
    eval_dataset: Iterable[Mapping[str, Any]] | None,
) -> tuple[Config, dict[str, list[dict[str, Any]]]]:
    """Put the names of objects into the settings that they take the place of.

    Args:
        config: Settings of the run.
        objects: Models.
        dataset: Training data, or None.
        eval_dataset: Evaluation data, or None.

    Returns:
        The settings, and the rows of the data by name.

    Raises:
        InvalidInput: Data are given for a run of several tasks, or cannot be read as rows.
    """
    rows_by_name, names = {}, dict[str, Any](objects.names())
    for setting, data in (("task", dataset), ("eval_task", eval_dataset)):
        if data is None:
            continue
        if config.tasks:
            raise InvalidInput(
                f"a data set is given for {setting}, but the settings have {len(config.tasks)} "
                "tasks; save it to a file and name that in its task"
            )
        names[setting], rows = rows_of_object(data)
        rows_by_name[names[setting]] = rows
    return with_settings(config, **names), rows_by_name
