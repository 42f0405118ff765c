"""The candidate pairs of an image by point ("edges"), from the batch's pairs sorted by point.

Points with more edges come first, in classes of up to 1, 2, 4, ... edges, so that those of a tile have about as many. A
tile's first edges lie side by side, then the second ones, and so on: a "step" each, for the points up to the last one
that has such an edge (jagged diagonals; Saad, Iterative Methods for Sparse Linear Systems, section 3.4).
"""

from collections import namedtuple

import triton
import triton.language as tl

POINTS = tl.constexpr(512)  # a tile of points; a thread has some of them, and loops over the edges of each
# Pointers to every edge's row, cost and plan entry, to every step's first edge, and to every tile's first step.
Edges = namedtuple("Edges", "gt cost plan step_edge tile_step num_points")


@triton.jit
def list_points(by_point, sorted_point, order, pair_gt, pair_cost, first, end):
    """Write the image's edges and points, and the point of every slot, from sorted edges `first` to `end`. Returns the
    number of points. Edges that only fill a step have infinite cost, and are at most as many as the others."""
    edge_gt, edge_cost, step_edge, tile_step, begin, ordered, slot_column, flat_point = by_point
    lane = tl.arange(0, POINTS)
    num_points = tl.zeros([], tl.int32)
    for base in range(first, end, POINTS):
        e = base + lane
        point = tl.load(sorted_point + e, mask=e < end, other=-1)
        head = (point != tl.load(sorted_point + e - 1, mask=(e > first) & (e < end), other=-1)) & (e < end)
        tl.store(begin + num_points + tl.cumsum(head.to(tl.int32), 0) - 1, e, mask=head)
        num_points += tl.sum(head.to(tl.int32), 0)
    tl.store(begin + num_points, end)
    tl.debug_barrier()

    left, fewer, most = num_points, 0, 1
    while left > 0:
        for base in range(0, num_points, POINTS):
            c = base + lane
            count = tl.load(begin + c + 1, mask=c < num_points, other=0)
            count -= tl.load(begin + c, mask=c < num_points, other=0)
            chosen = ((count > fewer) & (count <= most)).to(tl.int32)
            tl.store(ordered + left - tl.cumsum(chosen, 0), c, mask=chosen > 0)
            left -= tl.sum(chosen, 0)
        fewer, most = most, 2 * most
    tl.debug_barrier()

    num_steps, num_edges = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for base in range(0, num_points, POINTS):
        c = base + lane
        exists = c < num_points
        point = tl.load(ordered + c, mask=exists, other=0)
        edge = tl.load(begin + point)
        count = tl.where(exists, tl.load(begin + point + 1) - edge, 0)
        tl.store(flat_point + c, tl.load(sorted_point + edge), mask=exists)
        tl.store(tile_step + base // POINTS, num_steps)
        d, width = 0, tl.minimum(num_points - base, POINTS)  # every point has an edge
        while width > 0:
            there = d < count
            slot = tl.load(order + edge + tl.where(there, d, 0))
            e = num_edges + lane
            tl.store(edge_gt + e, tl.load(pair_gt + slot), mask=lane < width)
            cost = tl.load(pair_cost + slot, mask=there, other=float("inf"))
            tl.store(edge_cost + e, cost, mask=lane < width)
            tl.store(slot_column + slot, c, mask=there)
            tl.store(step_edge + num_steps, num_edges)
            num_edges += width
            num_steps += 1
            d += 1
            width = tl.max(tl.where(d < count, lane + 1, 0), 0)
    tl.store(tile_step + tl.cdiv(num_points, POINTS), num_steps)
    tl.store(step_edge + num_steps, num_edges)
    return num_points


@triton.jit
def point_tile(edges, base):
    """A tile of points, whether they exist, and its first and last step."""
    c = base + tl.arange(0, POINTS)
    step = edges.tile_step + base // POINTS
    return c, c < edges.num_points, tl.load(step), tl.load(step + 1)


@triton.jit
def edge_step(edges, step):
    """An edge for every point of a tile, and whether it is there."""
    e = tl.load(edges.step_edge + step) + tl.arange(0, POINTS)
    return e, e < tl.load(edges.step_edge + step + 1)
