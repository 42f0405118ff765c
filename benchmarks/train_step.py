"""A whole training step beside one of torchvision's FCOS: that both learn first, then images per second and the rest.

    python -m benchmarks.train_step [--out FILE] [--case resnet50] [--case resnet18] [--repeats N] [--no-compile]

On a GPU resnet50 (800 x 1344, 16 images) and resnet18 (320 x 320, 32 images, where launches set the pace) in bfloat16,
eager and compiled; on a CPU small versions of both in float32, compiled only when asked with --compile. What the two
sides share and where they differ: benchmarks/contestants.py. Reports no cost, and ends with status 1, when the pyramids
of the two differ, a loss is not finite, a gradient vanishes or nothing is matched.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.contestants import CONTESTANTS, Case, Contestant, Sanity, check, make_batch, pyramid_difference
from benchmarks.measure import MIB, host_syncs, launches, peak_mib, time_ms
from model.batch import Batch
from training.environment import environment

CASES = {
    "cuda": {"resnet50": Case("resnet50", (800, 1344), 16), "resnet18": Case("resnet18", (320, 320), 32)},
    "cpu": {"resnet50": Case("resnet50", (256, 320), 2), "resnet18": Case("resnet18", (160, 160), 4)},
}
COMPILED = ("ours", "torchvision, channels last")
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
WARMUP_STEPS = {"cuda": 3, "cpu": 1}
LEAST_STEPS, ROW_S = 5, 5.0
BUDGET_S = {"cuda": 330.0, "cpu": math.inf}  # compiled rows that would not end before that are left out
COMPILED_ROW_S = 90.0  # what one is expected to take, if none before it took longer
PYRAMID_TOLERANCE = 1e-2  # relative; convolutions in TF32


@dataclass
class StepRow:
    """One line of the table; None is what cannot be measured on this device."""

    images_per_s: float
    ms_median: float
    ms_quantile_20: float
    ms_quantile_80: float
    steps: int  # that were timed
    phase_ms: dict[str, float]  # medians; those of one compiled region are told together
    phase_share: dict[str, float]
    resident_mib: float  # between two steps: batch, weights, momentum
    peak_mib: float  # of tensors, those included
    kernel_launches: int | None
    copies_and_memsets: int | None
    host_syncs: int | None
    tflop_per_s: float
    matmul_share: float  # of the measured rate of a large matrix product
    first_pass_s: float  # with the compilation, where there is one


def gate(case: Case, batch: Batch, bf16: bool) -> tuple[dict[str, Sanity | str], list[str]]:
    """Of every contestant in its eager form, or why there is nothing; and what speaks against telling any cost."""
    results, failures, pyramids = {}, [], {}
    for name, entrant in CONTESTANTS.items():
        try:
            with entrant(case, batch, bf16) as contestant:
                with torch.no_grad():
                    pyramids[name] = contestant.pyramid()
                results[name] = result = check(contestant, count_flops=True)
        except torch.OutOfMemoryError as error:
            results[name] = in_short(error)
        contestant = None  # or it would stay in memory beside the next
        release(batch.images.device)
        if isinstance(results[name], str):
            failures += [f"{name}: {results[name]}"] if name == "ours" else []
            print(f"  {name}: {results[name]}")
            continue
        failures += [f"{name}: {text}" for text in result.failures()]
        difference = pyramid_difference(pyramids[name], pyramids["ours"]) if "ours" in pyramids else math.nan
        if not difference < PYRAMID_TOLERANCE:
            failures.append(f"{name}: its feature maps differ from ours by {difference:.2g}")
        terms = ", ".join(f"{term} {value:.3g}" for term, value in result.losses.items())
        print(
            f"  {name}: {result.parameters / 1e6:.1f} M parameters, {result.points:,} points, {result.positives:,} "
            f"positive; {terms}; gradient {result.gradient_norm:.3g}; pyramid differs by {difference:.1g}"
        )
    return results, failures


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def release(device: torch.device) -> None:
    """What a contestant's closures have kept alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed_steps(contestant: Contestant, repeats: int) -> list[list[float]]:
    """Phases in ms of up to `repeats` steps, for some seconds. As in train.py the host waits for the step before the
    one that it has just launched, so that it is never further ahead of the device.
    """
    steps, started, on_gpu = [], time.perf_counter(), contestant.device.type == "cuda"
    while len(steps) < repeats and (len(steps) < LEAST_STEPS or time.perf_counter() - started < ROW_S):
        contestant.step()
        steps.append(contestant.moments)
        if on_gpu and len(steps) > 1:
            steps[-2][-1].synchronize()
    if on_gpu:
        torch.cuda.synchronize(contestant.device)
    return [contestant.phases_ms(moments) for moments in steps]


def allocated_mib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else 0.0


def resident_mib(contestant: Contestant, batch: Batch, before_mib: float) -> float:
    """On a GPU without the `before_mib` of others, such as the workspace of the matrix product."""
    if contestant.device.type == "cuda":
        return allocated_mib(contestant.device) - before_mib
    tensors = [*batch, *contestant.model.state_dict().values()]
    tensors += [t for state in contestant.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / MIB


def measure_row(
    contestant: Contestant, batch: Batch, before_mib: float, tflop: float, rate: float, repeats: int
) -> StepRow | str:
    """The row, or why there is none. `before_mib` was allocated before the contestant and its batch; `rate`, of a large
    matrix product, in TFLOP/s.
    """
    device, started = contestant.device, time.perf_counter()
    failures = check(contestant, count_flops=False).failures()
    first_pass_s = time.perf_counter() - started
    if failures:
        return "; ".join(failures)
    for _ in range(WARMUP_STEPS[device.type]):
        contestant.step()
    steps = torch.tensor(timed_steps(contestant, repeats), dtype=torch.float64)
    low, middle, high = steps.sum(1).quantile(steps.new_tensor([0.2, 0.5, 0.8])).tolist()
    resident = resident_mib(contestant, batch, before_mib)
    return StepRow(
        len(batch.images) / middle * 1e3, middle, low, high, len(steps),
        dict(zip(contestant.phases, steps.quantile(0.5, dim=0).tolist(), strict=True)),
        dict(zip(contestant.phases, (steps.sum(0) / steps.sum()).tolist(), strict=True)),
        resident, resident + peak_mib(lambda: contestant.step().values(), device),
        *launches(contestant.step, device), host_syncs(contestant.step, device),
        tflop / middle * 1e3, tflop / middle * 1e3 / rate, first_pass_s,
    )  # fmt: skip


def measure_entrant(
    contest: "Contest", entrant: str, device: torch.device, bf16: bool, compiled: bool, rate: float, repeats: int
) -> StepRow | str:
    """The row of an entrant, which leaves nothing in memory. A compiler's failure, or too little memory, costs a row,
    not those that were measured before it.
    """
    sanity = contest.sanity[entrant]
    if isinstance(sanity, str):
        return sanity
    torch.backends.cudnn.benchmark = compiled  # as in train.py
    torch._dynamo.reset()  # or the contestants before count towards its limit of recompilations
    before_mib = allocated_mib(device)
    batch = contest.batch.to(device)
    try:
        with CONTESTANTS[entrant](contest.case, batch, bf16) as contestant:
            if compiled:
                contestant.compile()
            return measure_row(contestant, batch, before_mib, sanity.tflop, rate, repeats)
    except Exception as error:
        if compiled or isinstance(error, torch.OutOfMemoryError):
            return in_short(error)
        raise


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median(time_ms(lambda: a @ b, 20, device, queued=True)) / 1e9


def print_row(title: str, row: StepRow | str) -> None:
    if isinstance(row, str):
        print(f"{title:46}  {row}")
        return
    counts = ("-" if n is None else f"{n:,}" for n in (row.kernel_launches, row.copies_and_memsets, row.host_syncs))
    print(
        f"{title:46}{row.images_per_s:8.2f}{row.ms_median:9.1f}{row.ms_quantile_20:9.1f}{row.ms_quantile_80:9.1f}"
        f"{row.peak_mib:10,.0f}" + "{:>8}{:>7}{:>6}".format(*counts) + f"{row.matmul_share:8.1%}"
    )
    print("    " + "   ".join(f"{phase} {share:.1%}" for phase, share in row.phase_share.items()))


@dataclass
class Contest:
    """A case, its batch on the host, and what has been found out about it; text says why something is missing."""

    case: Case
    batch: Batch
    sanity: dict[str, Sanity | str]
    rows: dict[str, StepRow | str]

    def report(self) -> dict:
        rows, sanity = (
            {name: {"skipped": found} if isinstance(found, str) else asdict(found) for name, found in table.items()}
            for table in (self.rows, self.sanity)
        )
        syncs = {title: row["host_syncs"] for title, row in rows.items() if title.startswith("ours")
                 and row.get("host_syncs") is not None}  # fmt: skip
        return {
            "about": self.case._asdict() | {"ground_truths": len(self.batch.gt_boxes)},
            "sanity": sanity,
            "rows": rows,
            "host_syncs_of_ours": {title: {"limit": 0, "measured": n, "reached": n == 0} for title, n in syncs.items()},
        }


def measure_rows(
    contests: dict[str, Contest], args: argparse.Namespace, device: torch.device, rate: float, bf16: bool,
    deadline: float,
) -> Iterator[None]:  # fmt: skip
    """All eager rows, then the compiled ones, printed; stops after each. A compiled one is expected to take as long as
    the slowest before it, and COMPILED_ROW_S at least.
    """
    order = [(name, entrant, False) for name in contests for entrant in CONTESTANTS]
    order += [(name, entrant, True) for name in contests for entrant in COMPILED if args.compile]
    slowest_s = COMPILED_ROW_S
    print(
        f"\n{'':46}{'img/s':>8}{'ms':>9}{'20 %':>9}{'80 %':>9}{'peak MiB':>10}{'kernels':>8}{'copies':>7}{'syncs':>6}"
        f"{'matmul':>8}"
    )
    for name, entrant, compiled in order:
        row_started, contest = time.perf_counter(), contests[name]
        if compiled and row_started + slowest_s > deadline:
            row = f"left out, the {args.budget:g} s of --budget are nearly over"
        else:
            row = measure_entrant(contest, entrant, device, bf16, compiled, rate, args.repeats)
            release(device)
            if compiled:
                slowest_s = max(slowest_s, time.perf_counter() - row_started)
        title = entrant + ", compiled" * compiled
        contest.rows[title] = row
        print_row(f"{name}: {title}", row)
        yield


def main(argv: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every row")
    parser.add_argument("--case", action="append", choices=CASES[device.type], help="may be repeated; default: all")
    parser.add_argument("--repeats", type=int, default=50, help=f"steps per row, at most; it ends after {ROW_S:g} s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=device.type == "cuda")
    parser.add_argument("--budget", type=float, default=BUDGET_S[device.type], metavar="S",
                        help="leave out compiled rows that are expected to end later than this")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args(argv)
    deadline = time.perf_counter() + args.budget
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # as train.py does
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    rate = matmul_tflop_per_s(device, torch.bfloat16 if bf16 else torch.float32)
    about = environment(device) | {"precision": "bfloat16" if bf16 else "float32", "matmul_tflop_per_s": rate}
    print(
        f"{about['device']}, threads {about['threads']}, torch {about['torch']}, {about['precision']}\n"
        f"column matmul: share of the {rate:.3g} TFLOP/s of a matrix product of side {MATMUL_SIDE[device.type]}"
    )

    contests, failures = {}, []
    for name in args.case or CASES[device.type]:
        case = CASES[device.type][name]
        batch = make_batch(case)
        height, width = case.image_size
        print(f"\n{name}: {case.images} images of {height} x {width}, ground truths {len(batch.gt_boxes)}")
        sanity, failed = gate(case, batch.to(device), bf16)
        contests[name] = Contest(case, batch, sanity, {})
        failures += [f"{name}, {text}" for text in failed]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1

    for _ in measure_rows(contests, args, device, rate, bf16, deadline):
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            cases = {name: contest.report() for name, contest in contests.items()}
            args.out.write_text(json.dumps(about | {"cases": cases}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a row is seen when it is measured, in a log file, too
    sys.exit(main())
