"""The code of docs/embedding.md, and small torchvision detectors made of it."""

import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.retinanet import RetinaNetHead

import kernels
from model.backbone import Backbone

PAGE = Path(__file__).parent.parent.parent / "docs" / "embedding.md"
SIZE_PX = 96


def block(word: str) -> str:
    """Return the page's block of Python with `word` in it."""
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if word in code)
    return code


def names_of(word: str) -> dict:
    """Run the block with `word` in it on this repository's kernels; return what the block defines."""
    names = {}
    with mock.patch.dict(sys.modules, ota_triton=kernels):
        exec(block(word), names)
    return names


class Levels(nn.Module):
    """A small backbone with five levels, as torchvision takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 64  # torchvision's heads have 32 groups, and level 7 may be one point
        self.backbone = Backbone("test_resnet", self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(level): features for level, features in enumerate(self.backbone(images))}


def torchvision_detector(name: str, num_classes: int = 1, seed: int = 0, size_px: int = SIZE_PX) -> nn.Module:
    """FCOS, OTAFCOS or OTARetinaNet, for images of one size. RetinaNet's head gets FCOS's norm, as it learns faster."""
    names = names_of("torchvision")
    torch.manual_seed(seed)
    settings = {"min_size": size_px, "max_size": size_px, "score_thresh": 0.05}
    if name != "FCOS":
        settings["anchor_generator"] = names["CenteredAnchors"](4 if name == "OTARetinaNet" else 1)
    if name == "OTARetinaNet":
        settings["head"] = RetinaNetHead(64, 1, num_classes, partial(nn.GroupNorm, 32))
    return names[name](Levels(), num_classes, **settings)


def gradients(model: nn.Module, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
    sum(model(images, targets).values()).backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def save_gradients_of_rank(rank: int, folder: Path, batch: list[tuple]) -> None:
    """Save what rank 0 of two has for the gradient, each with one image of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("OTAFCOS", "OTARetinaNet"):
        model = DistributedDataParallel(torchvision_detector(name))
        found = gradients(model, *([part[rank]] for part in batch))
        if rank == 0:
            torch.save(found, folder / name)
    dist.destroy_process_group()
