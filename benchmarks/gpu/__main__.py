"""Prove on a GPU that the toolkit computes what it should, and measure how fast.

    python -m benchmarks.gpu [--minutes 8] [--small] [--out FOLDER]
    python -m benchmarks.gpu --dry-run      # everything at toy sizes on a CPU

One command for any CUDA machine with a checkout, torch and transformers. Parts run by priority
within the budget; one that fails is recorded and the others go on. `results.json` and `results.md`
are written after every part. Exit code 1 if a number was wrong or a part raised an error.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="budget; later parts are skipped"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--small", action="store_true", help="stay within 24 GB of the device")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder of the results"
    )
    args = parser.parse_args(arguments)
    if args.dry_run:  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from benchmarks.gpu.setting import Setting, describe_machine, missing_packages

    missing = missing_packages()
    for name, cost in missing.items():
        print(f"not installed: {name}; {cost}")

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error(
            f"torch {torch.__version__} finds no CUDA device; install a build of torch for this "
            "machine's driver, or test the command with --dry-run"
        )
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.runner import exit_code, run_parts
    from benchmarks.gpu.table import markdown, write_results

    setting = Setting("cpu" if args.dry_run else "cuda", args.dry_run, args.small)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # references are float32, not TF32
    machine = describe_machine(setting) | {"budget": f"{args.minutes:g} minutes"}
    for name, fact in machine.items():
        print(f"{name}: {fact}")
    outcomes = run_parts(
        PARTS, setting, args.minutes, lambda x: write_results(args.out, machine, missing, x)
    )
    print(markdown(machine, missing, outcomes))
    print(f"results are in {args.out}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
