"""RetinaNet (Lin et al., ICCV 2017, arXiv 1708.02002), with the one anchor per point of ATSS's comparison."""

from .claims import Claims, ImageInputs

POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4


def retinanet_claims(image: ImageInputs) -> Claims:
    """Claim the points in the object's box whose square anchor of 8 strides has an IoU of at least 0.5 with the object,
    and those with its best IoU (low-quality matches, as in Faster R-CNN). A point goes to the claiming object with the
    highest IoU; an unclaimed one whose highest IoU lies between 0.4 and 0.5 is neither positive nor negative. Depends
    on no prediction. The paper also has positives outside the box; this detector's boxes contain their points."""
    iou, inside = image.anchor_iou(), image.inside()
    best = iou.masked_fill(~inside, 0).amax(1, keepdim=True)
    wanted = inside & ((iou >= POSITIVE_IOU) | ((iou == best) & (best > 0)))
    highest = iou.amax(0)
    return Claims(wanted, -iou, (highest >= NEGATIVE_IOU) & (highest < POSITIVE_IOU))
