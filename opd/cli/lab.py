"""The `opd lab` command."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from diagnostics.errors import InvalidInput
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
from opd.lab.family import build_pair
from opd.lab.knobs import PairKnobs

KIND = tyro.conf.create_mutex_group(required=False, title="kinds of models")


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Train a toy pair from scratch: a teacher and a weaker student."""

    out: str = ""
    """folder (default: lab, lab-tiny, lab-mismatched, lab-household, lab-view, lab-family, smollm,
    lab-pretrained)"""
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
    family: Annotated[bool, KIND] = False
    """a pair with the knobs below"""
    smollm: Annotated[bool, KIND] = False
    """a small pretrained model and a copy with fewer layers"""
    pretrained: Annotated[bool, KIND] = False
    """a small pretrained model, and the same model taught word problems as its teacher"""
    jobs: int = 2
    """models trained in parallel; those of --family are trained one after the other"""
    bases: str = ""
    """folder of base models that pairs of --family share (default: each pair has its own)"""
    knobs: PairKnobs = field(default_factory=PairKnobs)


def main(argv: list[str]) -> None:
    """Run `opd lab [--out DIR] [--seed N] [--tiny | ... | --pretrained]`."""
    refuse_renamed_options(argv, LAB_KINDS, "opd lab")
    options = parse_options(LabOptions, argv, "opd lab")
    if options.family:
        bases = Path(options.bases) if options.bases else None
        student, teacher = build_pair(
            Path(options.out or "lab-family"), options.knobs, options.seed, bases
        )
        print(f"student: {student}\nteacher: {teacher}")
        return
    refuse_knobs(options)
    if options.smollm:
        from opd.lab.smollm import build as build_smollm

        student, teacher = build_smollm(Path(options.out or "smollm"), options.seed)
        print(f"student: {student}\nteacher: {teacher}")
        return
    if options.pretrained:
        from opd.lab.pretrained.pair import TeachingConfig
        from opd.lab.pretrained.pair import build as build_pretrained

        folder = Path(options.out or "lab-pretrained")
        student, teacher = build_pretrained(folder, TeachingConfig(seed=options.seed))
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


def refuse_knobs(options: LabOptions) -> None:
    """Refuse options of --family for models of another kind."""
    default = PairKnobs()
    changed_names = [
        field.name
        for field in fields(PairKnobs)
        if getattr(options.knobs, field.name) != getattr(default, field.name)
    ]
    changed_names += ["bases"] if options.bases else []
    if changed_names:
        names = ", ".join("--" + name.replace("_", "-") for name in changed_names)
        raise InvalidInput(f"{names} has an effect with --family only; add --family, or remove it")
