"""The page of the API reference: one entry for every public name."""

PUBLIC = {
    "diagnostics": {
        "Monitor": "diagnostics.monitor",
        "PANEL": "diagnostics.catalogue",
        "Alarms": "diagnostics.alarms.alarms",
        "Rollouts": "diagnostics.batch",
        "ScoredRollouts": "diagnostics.batch",
        "Support": "diagnostics.batch",
        "from_logits": "diagnostics.adapters.from_logits",
        "bootstrap_interval": "diagnostics.stats",
        "to_file": "diagnostics.records.sinks",
    },
    "opd": {
        "Config": "opd.config.settings",
        "train": "opd.training.train",
        "load_pair": "opd.teachers.pair",
        "ModelPair": "opd.teachers.pair",
        "OBJECTIVES": "opd.objectives.catalogue",
        "Objective": "opd.objectives.catalogue",
    },
}
"""Package -> its public names and the modules that define them."""

HEADER = """# API

*Generated from the public names by `python -m docs.generate`; the descriptions are the docstrings.*

These names are the interface of the library. Everything else may change without notice: modules are
private even where their names have no underscore.
"""

OPTIONS = {"Config": ["members: false", "show_attributes: false"]}
"""Name -> options of its entry."""


def page() -> str:
    """Return the page in Markdown, with the directives of mkdocstrings."""
    lines = [HEADER]
    for package, names in PUBLIC.items():
        lines += [f"## {package}", ""]
        for name, module in names.items():
            lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines).rstrip() + "\n"
