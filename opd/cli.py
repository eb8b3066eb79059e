"""The `opd` command: looks up the sub-command and imports only what that one needs."""

import argparse
import json
import sys
from importlib import import_module

COMMANDS = {
    "demo": ("opd.demo", "the whole house: study, lab pair, two objectives, figures"),
    "study": ("synthetic.run", "exact synthetic studies: list, run NAME|all"),
    "lab": ("opd.lab", "build the lab pair, a teacher and a weaker student, from nothing"),
    "doctor": ("opd.doctor", "pre-flight: what about a student and a teacher would go wrong"),
    "train": ("opd.cli:train", "distil a teacher into a student: RECIPE [--field value]"),
    "eval": ("opd.cli:evaluate", "accuracy of a model on held-out problems, with an interval"),
    "diagnose": ("opd.diagnose", "run the diagnostics on saved batches or a run folder"),
    "report": ("opd.report", "one self-contained HTML page about one or several runs"),
    "figures": ("figures.__main__", "draw figures from recorded tables, without torch"),
}


def usage() -> str:
    lines = [f"  {name:9} {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: opd COMMAND [...]\n\n" + "\n".join(lines) + "\n\n`opd COMMAND --help` says more."


def main() -> None:
    """Entry point: run a sub-command, or print what there is."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(f"opd: unknown command {argv[0]!r}\n\n{usage()}")
    try:
        module, _, name = COMMANDS[argv[0]][0].partition(":")
        getattr(import_module(module), name or "main")(argv[1:])
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if type(error) not in (ValueError, FileNotFoundError, RuntimeError):
            raise
        raise SystemExit(f"opd {argv[0]}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def train(argv: list[str]) -> None:
    """`opd train RECIPE [--field value ...]`."""
    from opd.recipes import parse

    config = parse(argv)
    from opd.train import train as run

    folder = run(config)
    print(f"run folder: {folder}\ntrained model: {folder / 'final'}")


def evaluate(argv: list[str]) -> None:
    """`opd eval MODEL [--task lab] [--problems N] ...`: one JSON line."""
    parser = argparse.ArgumentParser(prog="opd eval")
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--task", default="lab", help='"lab" or a .jsonl/.parquet file')
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--max-response", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = vars(parser.parse_args(argv))
    from opd.evaluate import evaluate_folder

    found = evaluate_folder(given.pop("model"), given.pop("task"), **given)
    print(json.dumps({k: v for k, v in found.items() if k != "outcomes"}))


if __name__ == "__main__":
    main()
