"""README.md states how many lines lead through the detector, from the paper's equations to the training loop."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
READING_PATH = (
    "kernels/assign_reference.py", "kernels/assign_torch.py", "model/head.py", "model/losses.py", "model/detector.py",
    "train.py",
)  # fmt: skip


def test_reading_path_has_the_lines_that_the_readme_states():
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in READING_PATH)
    stated = re.search(r"reading path[^\n]*?([\d,]+) lines", (ROOT / "README.md").read_text(), re.IGNORECASE)
    assert stated, f"README.md does not say that the reading path has about {lines:,} lines"
    assert abs(int(stated[1].replace(",", "")) - lines) <= 0.03 * lines, f"the reading path has {lines:,} lines"
