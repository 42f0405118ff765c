"""One-to-one matching by the least cost over all objects, as in DETR (Carion et al., ECCV 2020, arXiv 2005.12872).

The class cost is Deformable DETR's (Zhu et al., ICLR 2021, arXiv 2010.04159), as classes are sigmoids. scipy solves the
problem on the host, which waits for the device.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from kernels.config import FOCAL_ALPHA

from .claims import Claims, ImageInputs

NO_SCIPY = "--assigner hungarian needs the package scipy: pip install scipy"
CLS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0


def hungarian_claims(image: ImageInputs) -> Claims:
    """Claim one point per object, none twice: the match with the least sum of 2 focal + 5 L1 - 2 GIoU. L1 is of centre,
    width and height, in units of the object's longer side; DETR's unit, the image's size, is unknown to an assigner,
    and a padded batch's would make labels depend on the other images. Raises ModuleNotFoundError without scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ModuleNotFoundError(NO_SCIPY) from error
    logit, _, giou, usable = image.all_predictions()
    p = logit.sigmoid()
    cls = FOCAL_ALPHA * (1 - p) ** 2 * F.softplus(-logit) - (1 - FOCAL_ALPHA) * p**2 * F.softplus(logit)
    longer_side = (image.gt_boxes[:, 2:] - image.gt_boxes[:, :2]).amax(1, keepdim=True)
    truth, predicted = (box_convert(boxes, "xyxy", "cxcywh") for boxes in (image.gt_boxes, image.boxes))
    cost = CLS_WEIGHT * cls + L1_WEIGHT * torch.cdist(truth, predicted, p=1) / longer_side - GIOU_WEIGHT * giou
    usable = usable & cost.isfinite()
    unusable_cost = cost.masked_fill(~usable, 0).abs().amax() * (2 * min(cost.shape)) + 1  # the last resort
    cost = torch.where(usable, cost, unusable_cost)
    row, point = linear_sum_assignment(cost.cpu().numpy())
    wanted = torch.zeros_like(usable)
    wanted[row, point] = True
    return Claims(wanted & usable, cost)
