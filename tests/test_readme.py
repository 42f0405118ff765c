"""The README's code, run as it stands there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import OTAConfig, PointGrid, ota_assign

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
SNIPPET = next(snippet for snippet in SNIPPETS if "def assign(" in snippet)


def predictions() -> tuple:
    generator = torch.Generator().manual_seed(0)
    strides, sizes = (8, 16), ((9, 12), (5, 6))
    class_maps = [torch.randn(2, 3, *size, generator=generator).to(DEVICE) for size in sizes]
    distance_maps = [30 * torch.rand(2, 4, *size, generator=generator).to(DEVICE) for size in sizes]
    gt_boxes = [torch.tensor([[4.0, 4, 50, 40], [30, 20, 90, 70]]).to(DEVICE), torch.zeros(0, 4, device=DEVICE)]
    gt_labels = [torch.tensor([1, 2], device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)]
    return class_maps, distance_maps, strides, gt_boxes, gt_labels


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_assignment_for_another_detector(compiled):
    names = {}
    exec(SNIPPET, names)
    class_maps, distance_maps, strides, gt_boxes, gt_labels = predictions()
    assign = torch.compile(names["assign"], fullgraph=True, backend="eager") if compiled else names["assign"]
    match = assign(class_maps, distance_maps, strides, gt_boxes, gt_labels)

    grid = PointGrid.for_image((72, 96), strides)
    logits = torch.cat([m.reshape(2, 3, -1) for m in class_maps], 2).transpose(1, 2)
    left, top, right, bottom = torch.cat([m.reshape(2, 4, -1) for m in distance_maps], 2).unbind(1)
    x, y = grid.points(DEVICE).unbind(1)
    boxes = torch.stack([x - left, y - top, x + right, y + bottom], -1)
    offsets = torch.tensor([0, 2, 2], device=DEVICE)
    expected = ota_assign(logits, boxes, gt_boxes[0], gt_labels[0], offsets, grid, OTAConfig())
    assert (match.gt_index[0] >= 0).any() and (match.gt_index[1] == -1).all()
    assert all(torch.equal(one, other) for one, other in zip(match, expected, strict=True))


def test_folder_works_elsewhere_under_another_name(tmp_path):
    """Without anything else of this repository on the path."""
    shutil.copytree(ROOT / "kernels", tmp_path / "assignment", ignore=shutil.ignore_patterns("__pycache__"))
    snippet = SNIPPET.replace("from kernels import", "from assignment import")
    code = (
        f"{snippet}\nmatch = assign([torch.zeros(1, 2, 4, 4)], [torch.ones(1, 4, 4, 4)], [8], [torch.tensor("
        "[[0., 0, 32, 32]])], [torch.tensor([1])])\nassert (match.gt_index == 0).any() and int(match.k) > 0"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
