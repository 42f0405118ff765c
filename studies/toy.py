"""A small scene of three objects that overlap, with predictions between them."""

import torch

from kernels import PointGrid
from tests.support.scenes import PRIOR_LOGIT, Scene

SIZE_PX = 128
STRIDES = (8, 16, 32)
BOXES_PX = ((16.0, 20.0, 88.0, 88.0), (38.0, 12.0, 110.0, 80.0), (28.0, 38.0, 98.0, 108.0))
SHARPNESS = 6.0  # of the weights
LOGIT_RISE = 7.0  # of the class at an object's centre


def toy_scene() -> Scene:
    """Three objects of one class on 3 levels. A point predicts a mean of the boxes, weighted by how close their centres
    are, and a logit that rises towards the closest centre.
    """
    grid, boxes = PointGrid.for_image((SIZE_PX, SIZE_PX), STRIDES), torch.tensor(BOXES_PX)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    distance = ((grid.points()[:, None] - center) / size).norm(dim=2)  # (N, 3), 0.5 about where a box ends
    predicted = (-SHARPNESS * distance).softmax(1) @ boxes
    logits = PRIOR_LOGIT + LOGIT_RISE * (1 - distance.amin(1, keepdim=True)).clamp(min=0)
    return Scene(logits[None], predicted[None], boxes, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), grid)
