"""The `opd lab` command."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from opd.lab.build import LabConfig, build, household_config, mismatched_config, tiny_config


def main(argv: list[str]) -> None:
    """`opd lab [--out DIR] [--seed N] [--tiny | --mismatched | --household | --smollm]`."""
    parser = argparse.ArgumentParser(prog="opd lab", description=__doc__)
    parser.add_argument(
        "--out", help="folder (default: lab, lab-tiny, lab-mismatched, lab-household, smollm)"
    )
    parser.add_argument("--seed", type=int, default=0)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    which.add_argument(
        "--mismatched", action="store_true", help="models that write in different ways, two tasks"
    )
    which.add_argument(
        "--household",
        action="store_true",
        help="an agent and its teachers: env:household, and problems",
    )
    which.add_argument(
        "--smollm", action="store_true", help="a small pretrained model and a thinned one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="1 builds one after the other")
    given = parser.parse_args(argv)
    if given.smollm:
        from opd.lab.smollm import build as build_smollm

        student, teacher = build_smollm(Path(given.out or "smollm"), given.seed)
        print(f"student: {student}\nteacher: {teacher}")
        return
    config, name = LabConfig(), "lab"
    if given.tiny:
        config, name = tiny_config(), "lab-tiny"
    if given.mismatched:
        config, name = mismatched_config(), "lab-mismatched"
    if given.household:
        config, name = household_config(), "lab-household"
    config, folder = dataclasses.replace(config, seed=given.seed), Path(given.out or name)
    student, teacher = build(folder, config, given.jobs)
    print(f"student: {student}\nteacher: {teacher}")
