"""Problems and repairs of a data set by kind, as messages: the count of each kind and its first culprits."""

from pathlib import Path

from data.files import DatasetError, near_misses, printable

CULPRITS_SHOWN, REPAIRS_SHOWN, CULPRIT_LENGTH = 5, 3, 400

Problems = dict[str, list[str]]  # kind -> one line for each culprit


def raise_problems(source: Path, problems: Problems, missing: list[str], folder: Path) -> None:
    """Raise a DatasetError with every kind of problem, its first culprits, and where missing files may be, if any."""
    if not problems:
        return
    head = f"{source}: {sum(map(len, problems.values()))} problem(s); correct the file or take these records out"
    remarks = [f"  {_shortened(remark)}" for remark in near_misses(missing, folder)]
    raise DatasetError("\n".join([head, *culprit_lines(problems), *remarks]))


def culprit_lines(problems: Problems) -> list[str]:
    """Return a line for each kind, with its count, and lines for its first culprits."""
    lines = []
    for kind, culprits in problems.items():
        lines += [f"  {kind}: {len(culprits)}", *(f"    {line}" for line in _first(culprits, CULPRITS_SHOWN))]
    return lines


def repair_lines(repairs: Problems) -> list[str]:
    """Return a line for each kind of repair, with its count and first culprits."""
    return [f"{kind}: {len(them)}; {'; '.join(_first(them, REPAIRS_SHOWN))}" for kind, them in repairs.items()]


def _first(culprits: list[str], count: int) -> list[str]:
    more = len(culprits) - count
    return [*map(_shortened, culprits[:count]), *[f"and {more} more"] * (more > 0)]


def _shortened(line: str) -> str:
    half, line = CULPRIT_LENGTH // 2, printable(line)
    return line if len(line) <= 3 * half else f"{line[:half]} [...] {line[-half:]}"
