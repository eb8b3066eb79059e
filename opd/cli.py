"""The `opd` command: looks up the sub-command and imports only what that one needs."""

import sys
from importlib import import_module

COMMANDS = {
    "train": ("opd.train", "distil a teacher into a student: RECIPE [--field value]"),
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
        import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if type(error) not in (ValueError, FileNotFoundError, RuntimeError):
            raise
        raise SystemExit(f"opd {argv[0]}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
