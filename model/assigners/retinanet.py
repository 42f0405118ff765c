"""RetinaNet (Lin et al., ICCV 2017, arXiv 1708.02002), with the one anchor per point of ATSS's comparison."""

from .claims import Claims, Image

POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4


def retinanet_claims(image: Image) -> Claims:
    """Points whose square anchor of 8 strides has an IoU of at least 0.5 with the object; an object claims the anchors
    that fit it best, however badly, too (low-quality matches). A point goes to the object with the highest IoU; one
    whose best lies between 0.4 and 0.5 is neither positive nor negative. Depends on no prediction."""
    iou = image.anchor_iou()
    best = iou.amax(1, keepdim=True)
    wanted = (iou >= POSITIVE_IOU) | ((iou == best) & (best > 0))
    highest = iou.amax(0)
    return Claims(wanted, -iou, (highest >= NEGATIVE_IOU) & (highest < POSITIVE_IOU))
