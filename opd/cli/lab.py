"""The `opd lab` command."""

import argparse
import dataclasses
from pathlib import Path

from diagnostics.records.renamed import LAB_KINDS, refuse_renamed_options
from opd.lab.build import LabConfig, build, household_config, mismatched_config, tiny_config


def main(argv: list[str]) -> None:
    """Run `opd lab [--out DIR] [--seed N] [--tiny | --mismatched | --household | --smollm]`."""
    parser = argparse.ArgumentParser(prog="opd lab", description=__doc__)
    parser.add_argument(
        "--out", help="folder (default: lab, lab-tiny, lab-mismatched, lab-household, smollm)"
    )
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tiny", action="store_true", help="tiny models that train in seconds")
    kind.add_argument(
        "--mismatched", action="store_true", help="models with different writing styles, two tasks"
    )
    kind.add_argument(
        "--household",
        action="store_true",
        help="a student of env:household and sorting, with two teachers",
    )
    kind.add_argument(
        "--smollm",
        action="store_true",
        help="a small pretrained model and a copy with fewer layers",
    )
    parser.add_argument("--jobs", type=int, default=2, help="models trained in parallel")
    refuse_renamed_options(argv, LAB_KINDS, "opd lab")
    args = parser.parse_args(argv)
    if args.smollm:
        from opd.lab.smollm import build as build_smollm

        student, teacher = build_smollm(Path(args.out or "smollm"), args.seed)
        print(f"student: {student}\nteacher: {teacher}")
        return
    config, name = LabConfig(), "lab"
    if args.tiny:
        config, name = tiny_config(), "lab-tiny"
    if args.mismatched:
        config, name = mismatched_config(), "lab-mismatched"
    if args.household:
        config, name = household_config(), "lab-household"
    config, folder = dataclasses.replace(config, seed=args.seed), Path(args.out or name)
    student, teacher = build(folder, config, args.jobs)
    print(f"student: {student}\nteacher: {teacher}")
