"""Write a trained detector as one file that runs without this repository.

    python export.py --weights runs/shapes-.../ota.safetensors --format onnx --nms      (pip install -e ".[export]")
    python export.py --weights hf://user/repo --format torch --out detector.pt2

Inputs   images (B, 3, H, W) uint8 RGB in 0..255, each in the upper left corner of its slot; any B, 0 too, and H and W
         in multiples of 32 from 160 to 16384 px
         sizes (B, 2) int64: height and width of every image, px, clamped to its slot; 0 means no image
Outputs  boxes (B, K, 4) float32 x1 y1 x2 y2 px, scores (B, K) float32, best first, labels (B, K) int64; rows that are
         no detection come last, with score 0, label -1 and a box of zeros. Without --nms: the candidates for NMS

Normalisation is inside; resizing is not. The metadata (ONNX: metadata_props; .pt2: the extra file ota.json) are JSON:
class_names, category_ids, cuts (lowest scores by label), image_size, preprocessing, nms and the thresholds.
"""

import argparse
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from errors import UserError, run_script
from kernels.grid import MAX_SIDE_PX
from model import Detector, is_on_hub, load, local_file, make_folder, write_file
from model.batch import SIZE_DIVISOR
from model.postprocess import suppressed

MIN_SIDE_PX = 160  # where the coarsest level has two rows: with one, torch takes shapes for constants
SETTINGS = ("image_size", "score_threshold", "nms_iou", "max_detections")  # of the metadata
PREPROCESSING = (
    "RGB, upright, uint8 0..255. Resize (bilinear, antialiased) to a shorter side of image_size[0], or less where the "
    "longer side would exceed image_size[1]. Put the image into the upper left corner of a slot whose sides are "
    "multiples of 32 px, at least 160. Divide boxes by the factors of the resizing."
)

# A single node in torch's graph, which the ONNX graph replaces by its own operator.
suppress_op = torch.library.custom_op("ota_triton::suppressed", suppressed, mutates_args=())
suppress_op.register_fake(lambda boxes, scores, *_: torch.empty_like(scores))


class ExportedDetector(nn.Module):
    """Inputs and outputs as above. `suppress` does the NMS, see model.postprocess.suppressed; None leaves it out."""

    def __init__(self, detector: Detector, suppress: Callable[..., Tensor] | None = None):
        super().__init__()
        self.detector, self.suppress = detector.to(memory_format=torch.contiguous_format), suppress

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = torch.stack([sizes[:, i].clamp(0, images.shape[2 + i]) for i in (0, 1)], 1)
        return self.detector.detect_padded(images, sizes, self.suppress)


def export_program(detector: Detector, suppress: Callable[..., Tensor] | None) -> ExportedProgram:
    # Two images and two sides that differ: torch would take equal numbers, and 1, for the same or for constants.
    images = torch.zeros(2, 3, 5 * SIZE_DIVISOR, 7 * SIZE_DIVISOR, dtype=torch.uint8)
    sizes = torch.tensor([images.shape[-2:]] * 2)
    height, width = (Dim(n, min=MIN_SIDE_PX // SIZE_DIVISOR, max=MAX_SIDE_PX // SIZE_DIVISOR) for n in ("h", "w"))
    shapes = {0: Dim("batch"), 2: SIZE_DIVISOR * height, 3: SIZE_DIVISOR * width}, {0: Dim("batch")}
    network = ExportedDetector(detector, suppress).eval()
    try:
        with torch.no_grad():
            return torch.export.export(network, (images, sizes), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # backbones fail on symbolic sizes in any way
        raise UserError(f"torch cannot export {detector.config.backbone} for images of any size: {error}") from error


def onnx_suppressed(boxes, scores, labels, num_classes: int, nms_iou: float, limit: int):
    """`suppressed` by ONNX's operator, which wants scores (B, C, K): a candidate has one in the row of its class."""
    from onnxscript import opset18 as op

    classes = op.Constant(value_ints=list(range(num_classes)))
    of_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))
    table = op.Where(of_class, op.Unsqueeze(scores, [1]), 0.0)
    kept = op.NonMaxSuppression(boxes, table, [limit], [nms_iou], [0.0])  # rows of image, class, candidate
    place = op.Gather(kept, [0, 2], axis=1)
    return op.ScatterND(op.Mul(scores, 0.0), place, op.GatherND(scores, place))


def metadata_of(detector: Detector, nms: bool) -> dict[str, object]:
    about = {name: getattr(detector, name) for name in ("class_names", "category_ids", "cuts")}
    about |= {name: getattr(detector.config, name) for name in SETTINGS}
    return about | {"nms": nms, "preprocessing": PREPROCESSING}


def export_onnx(detector: Detector, nms: bool) -> bytes:
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f'--format onnx needs {" and ".join(missing)}: pip install -e ".[export]"')
    settings = {"input_names": ("images", "sizes"), "output_names": ("boxes", "scores", "labels"), "opset_version": 18}
    settings["custom_translation_table"] = {torch.ops.ota_triton.suppressed.default: onnx_suppressed}
    program = export_program(detector, suppress_op if nms else None)
    program = torch.onnx.export(program, **settings, dynamo=True, verbose=False)
    program.model.metadata_props.update((k, json.dumps(v)) for k, v in metadata_of(detector, nms).items())
    return program.model_proto.SerializeToString()


def export_torch(detector: Detector, nms: bool) -> bytes:
    """A file for torch.export.load; with NMS it needs `import torchvision` before. Raises UserError."""
    buffer, files = io.BytesIO(), {"ota.json": json.dumps(metadata_of(detector, nms))}
    torch.export.save(export_program(detector, suppressed if nms else None), buffer, extra_files=files)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="torch: a .pt2 of torch.export")
    parser.add_argument("--nms", action="store_true", help="suppress in the graph: detections come out, not candidates")
    parser.add_argument("--out", type=Path, help="default: beside the weights; the current folder for the hub's")
    args = parser.parse_args()

    weights = local_file(args.weights)
    detector = load(weights)
    export, suffix = (export_onnx, ".onnx") if args.format == "onnx" else (export_torch, ".pt2")
    out = args.out or (Path() if is_on_hub(args.weights) else weights.parent) / (weights.stem + suffix)
    make_folder(out.parent)  # before the work
    data = export(detector, args.nms)
    try:
        write_file(out, data)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; name another file with --out") from error
    kind = "detections" if args.nms else "candidates, without NMS"
    print(f"wrote {out}: {len(data) / 2**20:.1f} MiB, {len(detector.class_names)} classes, {kind}")


if __name__ == "__main__":
    run_script(main)
