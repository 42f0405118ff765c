"""Run every benchmark that this machine can run, most important first, each in a process.

    python -m benchmarks [--budget SECONDS] [--out DIR]

A benchmark rewrites its JSON file after every row, so the end of the budget costs one row at most. Exits with
status 1 when one fails. `python -m benchmarks.tables` then writes the tables of README.md and docs/.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def planned(gpu: str | None) -> dict[str, list[str]]:
    """Result files, and the module and flags that write them, on the GPU of that name or on a CPU."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")) if gpu else "cpu"
    workloads = ("coco", "crowd", "aerial") if gpu else ("single",)
    commands = {f"assign-{workload}-{name}.json": ["assign", "--workload", workload] for workload in workloads}
    commands |= {f"losses-{name}.json": ["losses"], f"train-step-{name}.json": ["train_step"]}
    commands |= {f"strategies-{name}.json": ["strategies"]}
    return commands | {"compile.json": ["compile"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=86_400, metavar="SECONDS", help="for all; default: a day")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    end, failed = time.monotonic() + args.budget, []
    for file, (module, *flags) in planned(torch.cuda.get_device_name() if torch.cuda.is_available() else None).items():
        command = [sys.executable, "-m", f"benchmarks.{module}", *flags, "--out", str(args.out.resolve() / file)]
        print(f"\n{' '.join(command[1:])}", flush=True)
        try:
            result = subprocess.run(command, cwd=RESULTS.parents[1], timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"the {args.budget:g} s of --budget are over")
            break
        failed += [module] if result.returncode else []
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
