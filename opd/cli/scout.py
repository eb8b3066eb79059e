"""The `opd scout` command."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.command import parse_options

if TYPE_CHECKING:
    from opd.analysis.scout.bank import Bank
    from opd.analysis.scout.report import ScoutReport
    from opd.config.settings import Config


@dataclass(frozen=True, kw_only=True)
class ScoutOptions:
    """Measure a student with one or several teachers before training, and forecast the outcome."""

    student: Positional[str] = ""
    """folder or hub name"""
    teachers: Positional[tuple[str, ...]] = ()
    """folders or hub names; several are ranked"""
    task: str = "lab"
    """"lab", a data file, hf:NAME or a benchmark; problems with answers"""
    prompt_column: str = "prompt"
    """column of a data file with the prompt"""
    answer_column: str = "answer"
    """column of a data file with the reference answer"""
    grader: str = ""
    """grader of responses, as for `opd train`; empty: the task's"""
    system: str = ""
    """system message before every prompt"""
    max_prompt: int = 512
    """longest prompt, in tokens"""
    max_response: int = 512
    """longest response, in tokens; that of the planned run"""
    rollouts: int = 256
    """responses of the student, four to each prompt"""
    seed: int = 0
    """seed of problems and sampling"""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the weights"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; review it first"""
    bank: Path | None = None
    """table of runs that the forecast is made from (default: the one of the package)"""
    out: Path | None = None
    """JSON file for the report, or for the scores of --validate"""
    show: Path | None = None
    """print the report of an earlier --out instead of measuring"""
    validate: bool = False
    """test the forecasts with each pair, and each family, left out, instead of measuring"""


def main(argv: list[str]) -> None:
    """Run `opd scout STUDENT TEACHER [TEACHER ...] [--task lab]`, or --validate, or --show FILE."""
    options = parse_options(ScoutOptions, argv, "opd scout")
    check_options(options)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.show is not None:
        from opd.analysis.scout.report import format_report, read_report

        print(format_report(read_report(options.show)))
        return
    if options.validate:
        print_validation(options)
        return
    from opd.analysis.scout.report import format_report, write_report

    report = run_scout(options)
    print(format_report(report))
    if options.out is not None:
        write_report(report, options.out)


def check_options(options: ScoutOptions) -> None:
    """Refuse options that contradict each other, or that lack the models.

    Args:
        options: The options.

    Raises:
        InvalidInput: See above.
    """
    has_models = bool(options.student or options.teachers)
    if options.validate and options.show is not None:
        raise InvalidInput("give either --validate or --show, not both")
    if (options.validate or options.show is not None) and has_models:
        flag = "--validate tests the bank" if options.validate else "--show prints a report"
        raise InvalidInput(f"{flag}, and measures no pair; remove STUDENT and TEACHER")
    if not options.validate and options.show is None:
        if not options.student or not options.teachers:
            raise InvalidInput("give STUDENT and one or several TEACHER; see `opd scout --help`")
        if len(set(options.teachers)) < len(options.teachers):
            raise InvalidInput(f"a teacher is given twice: {' '.join(options.teachers)}")


def load_bank(options: ScoutOptions) -> "Bank | None":
    """Read the bank that the options name, or the package's; None if the package has none.

    Args:
        options: The options.

    Returns:
        The bank.

    Raises:
        MissingFile: The named bank does not exist.
    """
    from opd.analysis.scout.bank import read_bank, recorded_bank

    path = options.bank or recorded_bank()
    if not path.exists() and options.bank is None:
        return None
    return read_bank(path)


def run_scout(options: ScoutOptions) -> "ScoutReport":
    """Measure every teacher, forecast and rank.

    Args:
        options: The options.

    Returns:
        The report.

    Raises:
        InvalidInput: No teacher can be used; with one teacher, its reason.
    """
    bank = load_bank(options)  # an unreadable bank is reported before anything is sampled
    from opd.analysis.scout.measure import PairMeasurements, check_teacher, measure_pair
    from opd.analysis.scout.recommend import fit_bank, ranking, report_teacher
    from opd.analysis.scout.report import ScoutReport

    configs = {teacher: make_config(options, teacher) for teacher in options.teachers}
    measurements: dict[str, PairMeasurements] = {}
    refused: dict[str, str] = {}
    for teacher, config in configs.items():
        try:
            check_teacher(config)
            measurements[teacher] = measure_pair(config)
        except InvalidInput as error:
            if len(configs) == 1:
                raise
            refused[teacher] = str(error)
    if not measurements:
        reasons = "; ".join(f"{teacher}: {reason}" for teacher, reason in refused.items())
        raise InvalidInput(f"no teacher can be used: {reasons}")
    fitted = None if bank is None else fit_bank(bank)
    reports = tuple(
        report_teacher(teacher, measured_pair, fitted)
        for teacher, measured_pair in measurements.items()
    )
    teachers, ranked_by = ranking(reports)
    return ScoutReport(
        student=options.student,
        task=options.task,
        settings={
            "max_prompt": options.max_prompt,
            "max_response": options.max_response,
            "rollouts": options.rollouts,
            "seed": options.seed,
        },
        bank="" if bank is None else bank.describe(),
        gain_doubts=() if fitted is None else fitted.verdict.gain_doubts,
        collapse_doubts=() if fitted is None else fitted.verdict.collapse_doubts,
        teachers=teachers,
        ranked_by=ranked_by,
        refused=refused,
    )


def make_config(options: ScoutOptions, teacher: str) -> "Config":
    """Return the settings of a scout of one teacher."""
    from opd.analysis.scout.measure import scout_config
    from opd.config.settings import with_settings

    config = scout_config(
        options.student,
        teacher,
        options.task,
        options.max_prompt,
        options.max_response,
        options.rollouts,
        options.seed,
    )
    return with_settings(
        config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        grader=options.grader,
        system=options.system,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )


def print_validation(options: ScoutOptions) -> None:
    """Test the bank with pairs and families left out; print, and write to --out, the scores.

    Args:
        options: The options.

    Raises:
        MissingFile: There is no bank.
        InvalidInput: It is too small.
    """
    from opd.analysis.scout.bank import recorded_bank
    from opd.analysis.scout.report import format_validation
    from opd.analysis.scout.validation import validate
    from opd.analysis.scout.verdict import judge

    bank = load_bank(options)
    if bank is None:
        raise MissingFile(
            f"{recorded_bank()} does not exist, so that there are no runs to test forecasts with; "
            "name a table of runs with --bank"
        )
    verdict = judge(bank)
    if verdict.validation is None:
        raise InvalidInput(f"nothing can be tested: {'; '.join(verdict.gain_doubts)}")
    validations = [validate(bank, "pair"), verdict.validation]
    print(format_validation(validations))
    for what, doubts in (("gain", verdict.gain_doubts), ("collapse", verdict.collapse_doubts)):
        print(f"{what} is {'not forecast' if doubts else 'forecast'}")
        for doubt in doubts:
            print(f"  {doubt}")
    if options.out is not None:
        from diagnostics.io.atomic import write_text

        scores = {validation.unit: asdict(validation) for validation in validations}
        verdicts = {
            "gain_doubts": verdict.gain_doubts,
            "collapse_doubts": verdict.collapse_doubts,
        }
        write_text(options.out, json.dumps({**verdicts, **scores}, indent=1))
