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

PAGE = Path(__file__).parent.parent.parent / "docs" / "embedding.md"
SIZE_PX, STRIDES = 96, (8, 16)


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


class Pyramid(nn.Module):
    """A backbone with a level for each of STRIDES."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 16, 32, 32, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU())
            for a, b in zip(channels, channels[1:], strict=False)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = []
        for layer in self.layers:
            levels.append(x := layer(x))
        return {str(s): levels[s.bit_length() - 2] for s in STRIDES}


def torchvision_detector(name: str) -> nn.Module:
    """OTAFCOS or OTARetinaNet for one class; RetinaNet's head with the norm that FCOS's has, as it learns faster."""
    names = names_of("torchvision")
    torch.manual_seed(0)
    head = {"head": RetinaNetHead(32, 1, 1, partial(nn.GroupNorm, 8))} if name == "OTARetinaNet" else {}
    anchors = names["CenteredAnchors"](1 if name == "OTAFCOS" else 4, STRIDES)
    return names[name](Pyramid(), 1, min_size=SIZE_PX, max_size=SIZE_PX, anchor_generator=anchors, **head)


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
