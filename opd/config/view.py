"""Whether a teacher reads something else than the student."""

from opd.config.settings import Config


def has_view(config: Config) -> bool:
    """Return whether the teacher of a task has prompts of its own.

    Args:
        config: Settings of the run or task.

    Returns:
        Whether a setting changes what the teacher reads.
    """
    view = config.view
    return bool(
        view.teacher_view
        or view.teacher_system
        or view.teacher_template != "student"
        or view.teacher_thinking != "same"
    )
