"""ota_assign: the one public function of label assignment, and the choice of its backend.

The backends are one torch operator, so that torch.compile keeps a call in its graph on every device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .assign_reference import ota_assign_reference
from .assign_torch import ota_assign_torch
from .config import Assignment, OTAConfig
from .grid import PointGrid

try:
    from .assign_triton import ota_assign_triton
    from .pairs_triton import COMPILED

    HAS_TRITON = True
except ImportError as error:
    HAS_TRITON, NO_TRITON, ota_assign_triton = False, str(error), None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BACKENDS = {"reference": ota_assign_reference, "torch": ota_assign_torch, "triton": ota_assign_triton}


def choose_backend(backend: str | None, backends: Iterable[str], device: torch.device) -> str:
    """`backend`, or for None "triton" on an NVIDIA or AMD GPU and "torch" elsewhere. Raises when it cannot run."""
    if backend is None:
        return "triton" if HAS_TRITON and device.type == "cuda" else "torch"
    if backend not in backends:
        raise ValueError(f"backend is {backend!r}, choose from {', '.join(backends)}")
    if backend == "triton" and not HAS_TRITON:
        raise ModuleNotFoundError(f"backend='triton' needs the package triton ({NO_TRITON}); backend='torch' does not")
    if backend == "triton" and device.type != "cuda" and COMPILED:
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, they are on {device}; TRITON_INTERPRET=1, set before "
            f"triton is imported, interprets the kernels on a CPU, slowly"
        )
    return backend


@torch.no_grad()
def ota_assign(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    grid: PointGrid,
    config: OTAConfig | None = None,
    *,
    backend: str | None = None,
    check: bool | None = None,
    max_pairs: int | None = None,
) -> Assignment:
    """Optimal transport assignment (Ge et al., CVPR 2021) of a batch: which ground truth each point learns.

    logits      (B, N, C)  raw class logits, before the sigmoid; N points in the order of `grid`
    boxes       (B, N, 4)  predicted boxes, x1 y1 x2 y2 in px
    gt_boxes    (G, 4)     ground truths of all images, one image after the other, in px
    gt_labels   (G,)       integers, 0..C-1; -1 marks a row to ignore
    gt_offsets  (B + 1,)   integers: image b owns rows gt_offsets[b] to gt_offsets[b + 1]; rows after that are padding

    An image's result does not depend on the batch it is in. Degenerate and non-finite boxes are ignored (k = 0),
    a non-finite prediction is nobody's candidate. `backend` is "reference" (dense, literal, float64-capable),
    "torch" (over candidate pairs, any device) or "triton" (the same in a few launches, never waiting for the device;
    capturable in a CUDA graph); None is "triton" on an NVIDIA or AMD GPU, "torch" elsewhere. `check` reads labels and
    offsets on the host and raises ValueError when they are out of range; by default on a CPU only, for elsewhere it
    would wait for the device. Unchecked, a row whose label is out of range is ignored, and offsets that fall give
    a result without meaning.

    `max_pairs` concerns "triton" with center_prior="none". The other priors bound the candidates of a ground truth,
    and memory with them (some 70 bytes for each possible pair); "none" allows all N, so memory would be for G N pairs.
    With `max_pairs` it is for that many, and more candidates than that are an error on the device.

    Raises ValueError for shapes, types or devices that do not fit, and TypeError for labels that are no integers.
    """
    config = config or OTAConfig()
    backend = choose_backend(backend, BACKENDS, boxes.device)
    inputs = check_inputs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid, check)
    rows, columns = zip(*grid.sizes, strict=True)
    match = _assign(
        *inputs, grid.strides, rows, columns, config.alpha, config.eps, config.iterations, config.top_q, config.per_q,
        config.fixed_k, config.center_prior, config.radius, config.cls_cost, config.reg_cost, config.rescale,
        max_pairs, backend,
    )  # fmt: skip
    return Assignment(*match)


SCHEMA = (  # spelled out, for what torch infers it from differs between versions
    "(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, int[] strides, int[] rows, "
    "int[] columns, float alpha, float eps, int iterations, int top_q, int per_q, int? fixed_k, str center_prior, "
    "float radius, str cls_cost, str reg_cost, bool rescale, int? max_pairs, str backend) -> (Tensor, Tensor, Tensor)"
)


# The name says which copy of this folder it belongs to, for a process may hold two.
@torch.library.custom_op(f"ota_triton::assign_{__package__.replace('.', '_')}", mutates_args=(), schema=SCHEMA)
def _assign(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor, strides: list[int],
    rows: list[int], columns: list[int], *settings: float | int | str | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (logits, boxes, gt_boxes, gt_labels, gt_offsets)
    grid = PointGrid(tuple(strides), tuple(zip(rows, columns, strict=True)))
    *settings, max_pairs, backend = settings
    config = OTAConfig(*settings)
    if backend == "triton":
        return tuple(ota_assign_triton(*inputs, grid, config, max_pairs))
    if boxes.device.type == "mps":  # has neither float64 nor segmented reductions
        match = BACKENDS[backend](*(t.cpu() for t in inputs), grid, config)
        return tuple(t.to(boxes.device) for t in match)
    return tuple(BACKENDS[backend](*inputs, grid, config))


@_assign.register_fake
def _(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    points = boxes.shape[:2]
    return (
        boxes.new_empty(points, dtype=torch.int64),
        boxes.new_empty(points, dtype=torch.float32),
        boxes.new_empty(gt_boxes.shape[0], dtype=torch.int32),
    )


def check_inputs(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    grid: PointGrid,
    check: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five tensors, labels and offsets as int64. Raises what `ota_assign` says."""
    _check_shapes(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid)
    gt_labels, gt_offsets = gt_labels.long(), gt_offsets.long()
    if check or (check is None and boxes.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_values(logits, gt_boxes, gt_labels, gt_offsets)
    return logits, boxes, gt_boxes, gt_labels, gt_offsets


def _check_shapes(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor, grid: PointGrid
) -> None:
    num_images, num_rows = logits.shape[0], gt_boxes.shape[0]
    expected = {
        "logits": (logits, (num_images, grid.num_points, logits.shape[-1])),
        "boxes": (boxes, (num_images, grid.num_points, 4)),
        "gt_boxes": (gt_boxes, (num_rows, 4)),
        "gt_labels": (gt_labels, (num_rows,)),
        "gt_offsets": (gt_offsets, (num_images + 1,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for a grid {grid.sizes}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, logits on {logits.device}")
        if name.startswith("gt_") and name != "gt_boxes":
            if tensor.dtype not in INTEGERS:
                raise TypeError(f"{name} is {tensor.dtype}, expected integers: int64, int32, int16, int8 or uint8")
        elif not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected floating point")


def _check_values(logits: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor) -> None:
    num_rows, num_classes = gt_boxes.shape[0], logits.shape[-1]
    bad_rows = ((gt_labels < -1) | (gt_labels >= num_classes)).nonzero()[:, 0].tolist()
    if bad_rows:
        label = int(gt_labels[bad_rows[0]])
        raise ValueError(
            f"gt_labels[{bad_rows[0]}] is {label}, expected 0..{num_classes - 1}, or -1 for a row to ignore "
            f"({len(bad_rows)} such rows)"
        )
    offsets = gt_offsets.tolist()
    if offsets != sorted(offsets) or offsets[0] < 0 or offsets[-1] > num_rows:
        raise ValueError(f"gt_offsets must rise from 0 to at most G = {num_rows}, not {offsets}")
