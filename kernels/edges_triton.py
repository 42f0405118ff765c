"""The candidate pairs of an image by point ("edges"), from the batch's pairs sorted by point.

Points with one edge come first, and their edges in the same order, so that such a point needs no list of edges; nearly
all points of an image with few objects have one edge.
"""

from collections import namedtuple

import triton
import triton.language as tl

POINTS = tl.constexpr(512)  # a tile of points; a thread has some of them, and loops over the edges of each
# Pointers to every edge's row, cost and plan entry, to every point's first edge, and to the most edges of a point in
# every tile. The first `num_single` points have one edge, from edge `first` on.
Edges = namedtuple("Edges", "gt cost plan begin most num_points num_single first")


@triton.jit
def _edge_tile(sorted_point, first, end, base):
    """Sorted edges, whether they exist, their points, and whether they are their point's first edge and only edge."""
    e = base + tl.arange(0, POINTS)
    exists = e < end
    point = tl.load(sorted_point + e, mask=exists, other=-1)
    head = exists & (point != tl.load(sorted_point + e - 1, mask=exists & (e > first), other=-1))
    return e, exists, point, head, head & (point != tl.load(sorted_point + e + 1, mask=e + 1 < end, other=-1))


@triton.jit
def _points_and_edges(begin, base, num_points):
    """A tile of points, whether they exist, and their first and last edge."""
    c = base + tl.arange(0, POINTS)
    exists = c < num_points
    return c, exists, tl.load(begin + c, mask=exists, other=0), tl.load(begin + c + 1, mask=exists, other=0)


@triton.jit
def list_points(by_point, sorted_point, order, pair_gt, pair_cost, first, end):
    """Write the image's edges by point, each point's first edge, and every tile's most edges of a point, from edges
    `first` to `end` of the sorted ones. Returns the number of points, and of points with one edge."""
    edge_gt, edge_cost, slot_column, begin, most, flat_point = by_point
    num_single = tl.zeros([POINTS], tl.int32)
    for base in range(first, end, POINTS):
        _, _, _, _, single = _edge_tile(sorted_point, first, end, base)
        num_single += single.to(tl.int32)
    num_single = tl.sum(num_single, 0)
    singles = tl.zeros([], tl.int32)
    num_points, next_edge = num_single, first + num_single
    for base in range(first, end, POINTS):
        e, exists, point, head, single = _edge_tile(sorted_point, first, end, base)
        # Three counts of up to POINTS in one: points with one edge, other points, and their edges.
        kind = tl.where(exists, tl.where(single, 1, (1 << 20) + (head.to(tl.int32) << 10)), 0)
        count, counted = tl.cumsum(kind, 0), tl.sum(kind, 0)
        column = tl.where(single, singles + (count & 1023), num_points + (count >> 10 & 1023)) - 1
        edge = tl.where(single, first + column, next_edge + (count >> 20) - 1)
        slot = tl.load(order + e, mask=exists, other=0)
        tl.store(edge_gt + edge, tl.load(pair_gt + slot, mask=exists, other=0), mask=exists)
        tl.store(edge_cost + edge, tl.load(pair_cost + slot, mask=exists, other=0.0), mask=exists)
        tl.store(slot_column + slot, column, mask=exists)
        tl.store(begin + column, edge, mask=head)
        tl.store(flat_point + column, point, mask=head)
        singles += counted & 1023
        num_points += counted >> 10 & 1023
        next_edge += counted >> 20
    tl.store(begin + num_points, end)
    tl.debug_barrier()
    for base in range(0, num_points, POINTS):
        _, _, first_edge, end_edge = _points_and_edges(begin, base, num_points)
        tl.store(most + base // POINTS, tl.max(end_edge - first_edge, 0))
    return num_points, num_single


@triton.jit
def point_tile(edges, base):
    """A tile of points, whether they exist, their first and last edge, and the most edges of one."""
    c, exists, begin, end = _points_and_edges(edges.begin, base, edges.num_points)
    return c, exists, begin, end, tl.load(edges.most + base // POINTS)
