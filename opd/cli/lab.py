"""The `opd lab` command."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.io.command import parse_options
from diagnostics.records.renamed import LAB_KINDS, refuse_renamed_options
from opd.lab.build import build
from opd.lab.configs import (
    LabConfig,
    household_config,
    mismatched_config,
    tiny_config,
    view_config,
)

KIND = tyro.conf.create_mutex_group(required=False, title="kinds of models")


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Train a toy pair from scratch: a teacher and a weaker student."""

    out: str = ""
    """folder (default: lab, lab-tiny, lab-mismatched, lab-household, lab-view, smollm)"""
    seed: int = 0
    """random seed"""
    tiny: Annotated[bool, KIND] = False
    """tiny models that train in seconds"""
    mismatched: Annotated[bool, KIND] = False
    """models with different writing styles, two tasks"""
    household: Annotated[bool, KIND] = False
    """a student of env:household and sorting, with two teachers"""
    view: Annotated[bool, KIND] = False
    """models that can use a worked solution in their prompt"""
    smollm: Annotated[bool, KIND] = False
    """a small pretrained model and a copy with fewer layers"""
    jobs: int = 2
    """models trained in parallel"""


def main(argv: list[str]) -> None:
    """Run `opd lab [--out DIR] [--seed N] [--tiny | ... | --smollm]`."""
    refuse_renamed_options(argv, LAB_KINDS, "opd lab")
    options = parse_options(LabOptions, argv, "opd lab")
    if options.smollm:
        from opd.lab.smollm import build as build_smollm

        student, teacher = build_smollm(Path(options.out or "smollm"), options.seed)
        print(f"student: {student}\nteacher: {teacher}")
        return
    config, name = LabConfig(), "lab"
    if options.tiny:
        config, name = tiny_config(), "lab-tiny"
    if options.mismatched:
        config, name = mismatched_config(), "lab-mismatched"
    if options.household:
        config, name = household_config(), "lab-household"
    if options.view:
        config, name = view_config(), "lab-view"
    config, folder = replace(config, seed=options.seed), Path(options.out or name)
    student, teacher = build(folder, config, options.jobs)
    print(f"student: {student}\nteacher: {teacher}")
