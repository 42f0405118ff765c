"""studies.compare: contestants, crowded images, the table; slow: two strategies trained and compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import seeds_table
from data import generate_shapes
from errors import UserError
from studies.compare import COLUMNS, STUDIES, crowded_images, flags_of

ROOT = Path(__file__).parents[1]


def test_contestants_are_flags_of_train():
    assert flags_of("atss") == ["--assigner", "atss"]
    expected = ["--assigner", "ota", "--ota", "center_prior=none", "top_q=10"]
    assert flags_of("ota:center_prior=none,top_q=10") == expected


@pytest.mark.parametrize(
    "contestant, message",
    [("otta", "otta is none of ota, fcos"), ("ota:radios=3", "'radios=3' is no key=value with a key of alpha, eps"),
     ("atss:radius=3", "radius=3 is for ota alone")],
    ids=["strategy", "setting", "setting-of-ota"],
)  # fmt: skip
def test_unknown_contestant(contestant, message):
    with pytest.raises(UserError, match=message):
        flags_of(contestant)


@pytest.mark.parametrize("study", STUDIES)
def test_studies_are_contestants(study):
    for contestant in STUDIES[study]:
        assert flags_of(contestant)


def test_crowded_images():
    """Boxes of 10 x 10 px. Image 1: 5 px apart, IoU 1/3; image 2: 6 px, IoU 1/4; image 3: one is a crowd region."""
    boxes = [(1, 0, 0), (1, 5, 0), (2, 0, 0), (2, 6, 0), (3, 0, 0), (3, 1, 1)]
    rows = [{"image_id": i, "bbox": [x, 0, 10, 10], "iscrowd": crowd} for i, x, crowd in boxes]
    assert crowded_images({"annotations": rows}) == {1}


def test_table_has_means_and_deviations():
    seeds = [{"AP": ap, "seconds": 60.0, "per_class": {"cat": 0.5}} for ap in (0.1, 0.2, 0.3)]
    lines = seeds_table({"ota": seeds, "fcos": seeds[:1]}, {"AP": "AP", "cat": "cats", "seconds": "s"}).splitlines()
    assert lines[0] == "|  | AP | cats | s | seeds |" and lines[3] == "| fcos | 0.100 | 0.500 | 60 | 1 |"
    assert lines[2] == "| ota | 0.200 ± 0.100 | 0.500 ± 0.000 | 60 ± 0 | 3 |"


@pytest.mark.slow
def test_two_strategies_side_by_side(tmp_path):
    generate_shapes(tmp_path / "shapes", train_images=8, val_images=4, size_px=64)
    flags = ["--image-size", "64", "--batch-size", "4", "--steps", "3", "--backbone", "test_resnet", "--no-pretrained"]
    command = [sys.executable, "-m", "studies.compare", "--data", str(tmp_path / "shapes"), "--seeds", "0", "1"]
    command += ["--assigners", "ota:radius=3", "fcos", "--out", str(tmp_path / "out"), "--", *flags, "--channels", "16"]
    for _ in range(2):  # the second time nothing is left to be trained
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [len(record["rows"][name]) for name in ("ota:radius=3", "fcos")] == [2, 2]
    rows = [row for name in record["rows"].values() for row in name]
    assert all(row["positives_per_gt"] > 0 and set(COLUMNS) <= row.keys() for row in rows)
    assert (tmp_path / "out" / "compare.png").exists()
