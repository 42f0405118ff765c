"""ota_assign, the public function of label assignment, and the choice of its backend."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .assign_reference import ota_assign_reference
from .assign_torch import ota_assign_torch
from .config import NAMESPACE, Assignment, Inputs, OTAConfig
from .grid import PointGrid

try:
    from .assign_triton import ota_assign_triton
    from .pairs_triton import COMPILED

    HAS_TRITON = True
except ImportError as error:
    HAS_TRITON, NO_TRITON, ota_assign_triton = False, str(error), None

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
        advice = "TRITON_INTERPRET=1, set before triton is imported, interprets the kernels on a CPU, slowly"
        raise ValueError(f"backend='triton' needs tensors on a GPU, they are on {device}; {advice}")
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
) -> Assignment:
    """Optimal transport assignment (Ge et al., CVPR 2021) of a batch: which ground truth each point learns.

    logits      (B, N, C)  raw class logits, before the sigmoid; N points in the order of `grid`
    boxes       (B, N, 4)  predicted boxes, x1 y1 x2 y2 in px
    gt_boxes    (G, 4)     ground truths of all images, one image after the other, in px
    gt_labels   (G,)       integers, 0..C-1; -1 marks a row to ignore
    gt_offsets  (B + 1,)   integers: image b owns rows gt_offsets[b] to gt_offsets[b + 1]; rows after that are padding

    An image's result does not depend on the batch it is in. Degenerate and non-finite boxes are ignored (k = 0),
    a non-finite prediction is no candidate. `backend` is "reference" (dense, literal, float64-capable), "torch"
    (over candidate pairs, any device) or "triton" (the same in a few launches, never waiting for the device;
    capturable in a CUDA graph); None is "triton" on an NVIDIA or AMD GPU, "torch" elsewhere. `check` reads labels and
    offsets on the host and raises ValueError when they are out of range; None checks on a CPU only, because elsewhere
    the host would wait for the device. Unchecked, a row whose label is out of range is ignored, and decreasing offsets
    give a meaningless result.

    "triton" reserves some 70 bytes for each possible pair; with center_prior="none" these are all G N pairs.

    Raises ValueError for shapes or devices that do not fit, and TypeError for wrong types.
    """
    config = config or OTAConfig()
    backend = choose_backend(backend, BACKENDS, boxes.device)
    inputs = check_inputs(Inputs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid), check)
    rows, columns = zip(*grid.sizes, strict=True)
    settings = [getattr(config, name) for name in OTAConfig.__dataclass_fields__]
    return Assignment(*_assign(*inputs[:5], grid.strides, rows, columns, *settings, backend))


# One torch operator for all backends, so that torch.compile keeps a call in its graph on every device.
SCHEMA = (  # explicit, because the schema that torch infers differs between versions
    "(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, int[] strides, int[] rows, "
    "int[] columns, float alpha, float eps, int iterations, int top_q, int per_q, int? fixed_k, str center_prior, "
    "float radius, str cls_cost, str reg_cost, bool rescale, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(f"{NAMESPACE}::assign", mutates_args=(), schema=SCHEMA)
def _assign(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    tensors, (strides, rows, columns), (*settings, backend) = arguments[:5], arguments[5:8], arguments[8:]
    inputs = Inputs(*tensors, PointGrid(tuple(strides), tuple(zip(rows, columns, strict=True))))
    config, device = OTAConfig(*settings), inputs.boxes.device
    if backend == "triton":
        return tuple(ota_assign_triton(inputs, config))
    if device.type == "mps":  # lacks float64 and segmented reductions
        return tuple(tensor.to(device) for tensor in BACKENDS[backend](inputs.to("cpu"), config))
    return tuple(BACKENDS[backend](inputs, config))


@_assign.register_fake
def _(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    gt_index = boxes.new_empty(boxes.shape[:2], dtype=torch.int64)
    k = gt_boxes.new_empty(gt_boxes.shape[0], dtype=torch.int32)
    return gt_index, torch.empty_like(gt_index, dtype=torch.float32), k


def check_inputs(inputs: Inputs, check: bool | None = None) -> Inputs:
    """The inputs with labels and offsets as int64. Raises what `ota_assign` documents."""
    logits, boxes, gt_boxes, gt_labels, gt_offsets, grid = inputs
    for name, tensor, axes in (("logits", logits, "(B, N, C)"), ("gt_boxes", gt_boxes, "(G, 4)")):
        if tensor.dim() != len(axes.split()):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {axes}")
    num_images, num_rows = logits.shape[0], gt_boxes.shape[0]  # len() would be a constant for torch.compile
    expected = {
        "logits": (logits, (num_images, grid.num_points, logits.shape[-1]), FLOATS),
        "boxes": (boxes, (num_images, grid.num_points, 4), FLOATS),
        "gt_boxes": (gt_boxes, (num_rows, 4), FLOATS),
        "gt_labels": (gt_labels, (num_rows,), INTEGERS),
        "gt_offsets": (gt_offsets, (num_images + 1,), INTEGERS),
    }
    check_tensors(expected, logits.device, grid)
    if check or (check is None and boxes.device.type == "cpu" and not torch.compiler.is_compiling()):
        num_classes, labels, offsets = logits.shape[-1], gt_labels.long(), gt_offsets.tolist()
        bad_rows = ((labels < -1) | (labels >= num_classes)).nonzero()[:, 0].tolist()
        if bad_rows:
            expectation = f"expected 0..{num_classes - 1}, or -1 for a row to ignore ({len(bad_rows)} such rows)"
            raise ValueError(f"gt_labels[{bad_rows[0]}] is {labels[bad_rows[0]]}, {expectation}")
        if offsets != sorted(offsets) or offsets[0] < 0 or offsets[-1] > len(labels):
            raise ValueError(f"gt_offsets must not fall, and lie in 0 to G = {len(labels)}, not {offsets}")
    return inputs._replace(gt_labels=gt_labels.long(), gt_offsets=gt_offsets.long())


def check_tensors(expected: dict[str, tuple], device: torch.device, grid: PointGrid | None = None) -> None:
    """Raise unless every (tensor, shape, types) of `expected` has that shape, one of these types and is on `device`."""
    for name, (tensor, shape, types) in expected.items():
        if tuple(tensor.shape) != shape:
            hint = f" for a grid {grid.sizes}" if grid else ""
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}{hint}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the predictions on {device}")
        if tensor.dtype not in types:
            raise TypeError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, types))}")
