"""Batches of images of one orientation, which pad to less than tall and wide images together."""

from collections.abc import Sequence


def grouped_by_orientation(order: Sequence[int], sizes: Sequence[tuple[int, int]], batch_size: int) -> list[int]:
    """The images of `order` in an order whose batches, of `batch_size` each, hold tall or wide images only.

    sizes: (height, width) of every image. Batches come in the order in which they fill up, images within one in that
    of `order`; what fills none comes last, so that at most one batch is mixed. A function of its arguments alone.
    """
    filling: dict[bool, list[int]] = {True: [], False: []}
    grouped: list[int] = []
    for i in order:
        height, width = sizes[i]
        batch = filling[height > width]
        batch.append(i)
        if len(batch) == batch_size:
            grouped += batch
            batch.clear()
    return grouped + filling[True] + filling[False]
