"""ota_assign in each of its backends, on the device where a backend is tested; scenes written down by hand.

On a GPU the Triton kernels are compiled. Elsewhere Triton's interpreter runs them, some hundred times slower, so tests
give the interpreter fewer ground truths.
"""

import pytest
import torch

from kernels import Assignment, OTAConfig, PointGrid, ota_assign
from kernels.assign import HAS_TRITON
from kernels.grid import valid_rows
from tests.support.parity import Parity, parity
from tests.support.scenes import Scene, trained_predictions

INTERPRETED = not torch.cuda.is_available()
GPU_OR_INTERPRETER = torch.device("cpu" if INTERPRETED else "cuda")
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
TRITON_MARKS = [NEEDS_TRITON] if INTERPRETED else [NEEDS_TRITON, pytest.mark.gpu]
TRITON = pytest.param("triton", marks=TRITON_MARKS)
COMPARED = ("torch", TRITON)  # against the reference
BACKENDS = ("reference", *COMPARED)

GRID = PointGrid.for_image((104, 136), (8, 16, 32))
N, C = GRID.num_points, 3
ORDINARY = (20.5, 18.0, 77.25, 61.0)  # a box with candidates on every level
OTHER = (50.0, 40.0, 120.0, 100.0)


def scene_of(
    gt_boxes: list, gt_labels: list[int] | None = None, offsets: list[int] | None = None, *, grid=GRID, seed=0
) -> Scene:
    """Ground truths given by hand, all in one image without `offsets`, under predictions that suit them."""
    boxes = torch.tensor(gt_boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([0] * len(boxes) if gt_labels is None else gt_labels, dtype=torch.int64)
    offsets = torch.tensor([0, len(boxes)] if offsets is None else offsets)
    image, valid = valid_rows(boxes, labels, offsets, C)
    generator = torch.Generator().manual_seed(seed)
    rows = [valid & (image == b) for b in range(len(offsets) - 1)]
    predictions = [trained_predictions(grid, boxes[row], labels[row], C, generator) for row in rows]
    logits, predicted = (torch.stack(tensors) for tensors in zip(*predictions, strict=True))
    return Scene(logits, predicted, boxes, labels, offsets, grid)


def device_of(backend: str) -> torch.device:
    return GPU_OR_INTERPRETER if backend == "triton" else torch.device("cpu")


def for_interpreter(backend: str, few, many):
    """`few` for Triton's interpreter, `many` for every other backend."""
    return few if backend == "triton" and INTERPRETED else many


def assign(*inputs, backend: str, check: bool = True) -> Assignment:
    """ota_assign on the backend's device; the result is on the CPU."""
    moved = (x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for x in inputs)
    return Assignment(*(tensor.cpu() for tensor in ota_assign(*moved, backend=backend, check=check)))


def assert_equal(one: tuple, other: tuple) -> None:
    """Two named tuples of tensors are the same, bit for bit."""
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert torch.equal(a, b), f"{name} differs at {(a != b).nonzero()[:8].tolist()}"


def assert_parity(scene: Scene, config: OTAConfig, backend: str) -> Parity:
    result = parity(scene.to(device_of(backend)), config, backend)
    assert not result.failures, "\n".join(result.failures)
    return result
