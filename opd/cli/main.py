"""The `opd` command: finds the sub-command and imports only the modules that it needs."""

import gc
import sys
from importlib import import_module

from diagnostics.io.command import run_command
from diagnostics.io.packages import explain_missing_packages
from diagnostics.terminal import protect_terminal

COMMANDS = {
    "demo": ("opd.experiments.demo", "run everything once: study, toy pair, training, figures"),
    "study": ("synthetic.runner.run", "run exact synthetic studies: list, run NAME|all"),
    "lab": ("opd.cli.lab", "train a toy pair from scratch: a teacher and a weaker student"),
    "map": ("opd.experiments.regimes.command", "train methods on pairs of models in many regimes"),
    "paper": ("opd.experiments.paper", "train every method of the paper's comparisons"),
    "doctor": ("opd.cli.doctor", "check a student and a teacher before training"),
    "plan": ("opd.cli.plan", "predict memory and time of a run before training"),
    "scout": ("opd.cli.scout", "measure a pair before training, and forecast the outcome"),
    "audit": ("opd.cli.audit", "say what a distillation loss estimates, and which faults it has"),
    "train": ("opd.cli.train", "distil a teacher into a student: RECIPE [--field value]"),
    "cache": ("opd.cli.cache", "score the responses of a run in advance, or check such scores"),
    "eval": ("opd.cli.evaluate", "measure a model's accuracy on held-out problems"),
    "probe-own-prefix": (
        "opd.cli.probe_own_prefix",
        "score the teacher on its own and on the student's responses of a run",
    ),
    "probe-continuation": (
        "opd.cli.probe_continuation",
        "let the teacher continue the student's partial responses, and grade it",
    ),
    "diagnose": ("opd.cli.diagnose", "compute the metrics of saved batches, records or a run"),
    "report": ("opd.cli.report", "write one self-contained HTML page about runs"),
    "figures": ("figures.__main__", "draw figures from recorded tables, without torch"),
}
EXTRAS = {"demo": "all", "study": "study", "figures": "figures"}
"""Command -> the extra that installs what it needs; "train" for the others."""
RENAMED = {"control": "probe-own-prefix", "continue": "probe-continuation"}
"""Former names of commands, which are refused with the present one."""

GARBAGE_THRESHOLDS = (20_000, 20, 20)
"""Allocations between two searches for cyclic garbage. With Python's own, 700, 10, 10, a sixth of
the time to import torch and transformers goes into searches that find nothing; steps of training
leave no tensors in cycles."""


def usage() -> str:
    """Return the help text with all sub-commands."""
    lines = [f"  {name:19} {description}" for name, (_, description) in COMMANDS.items()]
    return (
        "usage: opd COMMAND [...]\n\n"
        + "\n".join(lines)
        + "\n\n`opd COMMAND --help` lists its options, `opd --version` prints the version."
    )


def main() -> None:
    """Run a sub-command, or print the available ones."""
    protect_terminal()
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        run_command("opd", lambda: print(usage()))
        return
    if argv[0] == "--version":
        from opd.runtime.version import __version__

        run_command("opd", lambda: print(f"opdlab {__version__}"))
        return
    if argv[0] in RENAMED:
        raise SystemExit(f"opd: {argv[0]!r} is now called {RENAMED[argv[0]]!r}")
    if argv[0] not in COMMANDS:
        raise SystemExit(f"opd: unknown command {argv[0]!r}\n\n{usage()}")

    def command() -> None:
        with explain_missing_packages("this command", EXTRAS.get(argv[0], "train")):
            import_module(COMMANDS[argv[0]][0]).main(argv[1:])

    run_command(f"opd {argv[0]}", command)


if __name__ == "__main__":
    main()
