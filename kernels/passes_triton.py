"""Passes over the sparse plan of one image, over its points' edges or its ground truths' slots.

A point's edges and a ground truth's slots lie one after the other, and background is one more entry of every point.
Potentials u, v and costs c are in units of eps / log2(e): a plan entry is 2^(u_i + v_j - c_ij), P_ij in short.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e300)


@triton.jit
def point_tile(point_begin, num_points, base, POINTS: tl.constexpr):
    """Numbers of a tile of points, which are there, where their edges begin and end (columns), and the most edges."""
    c = base + tl.arange(0, POINTS)
    here = c < num_points
    begin = tl.load(point_begin + c, mask=here, other=0)
    end = tl.load(point_begin + c + 1, mask=here, other=0)
    return c, here, begin[:, None], end[:, None], tl.max(end - begin, 0)


@triton.jit
def _edge_tile(edge_gt, begin, end, d, LANES: tl.constexpr):
    """The next edges of a tile of points, which of them are there, and their ground truths."""
    e = begin + (d + tl.arange(0, LANES)[None, :])
    on = e < end
    return e, on, tl.load(edge_gt + e, mask=on, other=0)


@triton.jit
def _row_tile(pair_start, pair_count, base, end_row, ROWS: tl.constexpr):
    """Rows of a tile of ground truths, their first slot and their number of slots, as columns."""
    g = base + tl.arange(0, ROWS)
    begin = tl.load(pair_start + g, mask=g < end_row, other=0)
    count = tl.load(pair_count + g, mask=g < end_row, other=0)
    return g, begin[:, None], count[:, None]


@triton.jit
def _slot_tile(v, slot_column, pair_cost, begin, count, d, SLOTS: tl.constexpr):
    """The next slots of a tile of ground truths, which of them are there, and their v_j - c_ij."""
    lane = d + tl.arange(0, SLOTS)[None, :]
    slot, on = begin + lane, lane < count
    cost = tl.load(pair_cost + slot, mask=on, other=float("inf"))
    column = tl.load(slot_column + slot, mask=on & (cost < float("inf")), other=0)
    return slot, on, tl.load(v + column, mask=on, other=0.0) - cost.to(tl.float64)


@triton.jit
def _add_exponents(peak, total, t):
    """Take exponents t (rows, lanes) in float64 into the running sums of 2^t, kept as 2^peak total."""
    new_peak = tl.maximum(peak, tl.max(t, 1))
    added = tl.sum(tl.exp2((t - new_peak[:, None]).to(tl.float32)), 1)
    return new_peak, total * tl.exp2((peak - new_peak).to(tl.float32)) + added


@triton.jit
def list_points(
    edge_gt, edge_cost, slot_column, point_begin, flat_point,
    sorted_point, order, pair_gt, pair_cost, first_edge, end_edge, EDGES: tl.constexpr,
):  # fmt: skip
    """Write the image's edges by point, and where every point's edges begin. Returns the number of points."""
    num_points = tl.zeros([], tl.int32)
    for base in range(first_edge, end_edge, EDGES):
        e = base + tl.arange(0, EDGES)
        here = e < end_edge
        point = tl.load(sorted_point + e, mask=here, other=0)
        previous = tl.load(sorted_point + e - 1, mask=here & (e > first_edge), other=-1)
        slot = tl.load(order + e, mask=here, other=0)
        head = here & (point != previous)
        column = num_points + tl.cumsum(head.to(tl.int32), 0) - 1
        tl.store(edge_gt + e, tl.load(pair_gt + slot, mask=here, other=0), mask=here)
        tl.store(edge_cost + e, tl.load(pair_cost + slot, mask=here, other=0.0), mask=here)
        tl.store(slot_column + slot, column, mask=here)
        tl.store(point_begin + column, e, mask=head)
        tl.store(flat_point + column, point, mask=head)
        num_points += tl.sum(head.to(tl.int32), 0)
    tl.store(point_begin + num_points, end_edge)
    return num_points


@triton.jit
def columns_in_log_domain(
    v, u, u_background, edge_gt, edge_cost, point_begin, num_points, POINTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """v_j = -log2 sum_i 2^(u_i - c_ij). Returns log2 sum_j 2^v_j over the listed points."""
    peak = tl.full([POINTS], LOWEST, tl.float64)
    total = tl.zeros([POINTS], tl.float32)
    for base in range(0, num_points, POINTS):
        c, here, begin, end, most = point_tile(point_begin, num_points, base, POINTS)
        column_peak = tl.zeros([POINTS], tl.float64) + u_background
        column_total = tl.full([POINTS], 1.0, tl.float32)
        for d in range(0, most, LANES):
            e, on, gt = _edge_tile(edge_gt, begin, end, d, LANES)
            cost = tl.load(edge_cost + e, mask=on, other=float("inf"))
            t = tl.load(u + gt, mask=on, other=0.0) - cost.to(tl.float64)
            column_peak, column_total = _add_exponents(column_peak, column_total, t)
        potential = -(column_peak + tl.log2(column_total).to(tl.float64))
        tl.store(v + c, potential, mask=here)
        peak, total = _add_exponents(peak, total, tl.where(here, potential, LOWEST)[:, None])
    highest = tl.max(peak, 0)
    return highest + tl.log2(tl.sum(total * tl.exp2((peak - highest).to(tl.float32)), 0)).to(tl.float64)


@triton.jit
def rows_in_log_domain(
    u, v, slot_column, pair_cost, pair_start, pair_count, supply, first_row, end_row, most_slots,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """u_i = log2 s_i - log2 sum_j 2^(v_j - c_ij)."""
    for base in range(first_row, end_row, ROWS):
        g, begin, count = _row_tile(pair_start, pair_count, base, end_row, ROWS)
        k = tl.load(supply + g, mask=g < end_row, other=0)
        peak = tl.full([ROWS], LOWEST, tl.float64)
        total = tl.zeros([ROWS], tl.float32)
        for d in range(0, most_slots, SLOTS):
            _, _, t = _slot_tile(v, slot_column, pair_cost, begin, count, d, SLOTS)
            peak, total = _add_exponents(peak, total, t)
        potential = tl.log2(k.to(tl.float32)).to(tl.float64) - peak - tl.log2(total).to(tl.float64)
        tl.store(u + g, potential, mask=k > 0)


@triton.jit
def plan_by_row(
    slot_plan, row_factor, u, v, slot_column, pair_cost, pair_start, pair_count, first_row, end_row, most_slots,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The plan by ground truth, and factors of one."""
    for base in range(first_row, end_row, ROWS):
        g, begin, count = _row_tile(pair_start, pair_count, base, end_row, ROWS)
        potential = tl.load(u + g, mask=g < end_row, other=0.0)[:, None]
        tl.store(row_factor + g, tl.full([ROWS], 1.0, tl.float32), mask=g < end_row)
        for d in range(0, most_slots, SLOTS):
            slot, on, t = _slot_tile(v, slot_column, pair_cost, begin, count, d, SLOTS)
            tl.store(slot_plan + slot, tl.exp2((potential + t).to(tl.float32)), mask=on)


@triton.jit
def plan_by_point(
    edge_plan, point_plan, point_factor, u, u_background, v, edge_gt, edge_cost, point_begin, num_points,
    POINTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The plan by point, background's entries apart, and factors of one."""
    for base in range(0, num_points, POINTS):
        c, here, begin, end, most = point_tile(point_begin, num_points, base, POINTS)
        potential = tl.load(v + c, mask=here, other=0.0)
        tl.store(point_plan + c, tl.exp2((u_background + potential).to(tl.float32)), mask=here)
        tl.store(point_factor + c, tl.full([POINTS], 1.0, tl.float32), mask=here)
        for d in range(0, most, LANES):
            e, on, gt = _edge_tile(edge_gt, begin, end, d, LANES)
            cost = tl.load(edge_cost + e, mask=on, other=float("inf"))
            t = tl.load(u + gt, mask=on, other=0.0) + potential[:, None] - cost.to(tl.float64)
            tl.store(edge_plan + e, tl.exp2(t.to(tl.float32)), mask=on)


@triton.jit
def columns(
    point_factor, row_factor, background_factor, edge_plan, point_plan, edge_gt, point_begin, num_points,
    POINTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """b_j = 1 / sum_i P_ij a_i. Returns what background then sends to the listed points, before its own factor."""
    sent = tl.zeros([POINTS], tl.float32)
    for base in range(0, num_points, POINTS):
        c, here, begin, end, most = point_tile(point_begin, num_points, base, POINTS)
        background = tl.load(point_plan + c, mask=here, other=0.0)
        received = tl.where(here, background * background_factor, 1.0)
        for d in range(0, most, LANES):
            e, on, gt = _edge_tile(edge_gt, begin, end, d, LANES)
            plan = tl.load(edge_plan + e, mask=on, other=0.0)
            received += tl.sum(plan * tl.load(row_factor + gt, mask=on, other=0.0), 1)
        tl.store(point_factor + c, 1.0 / received, mask=here)
        sent += background / received
    return tl.sum(sent, 0)


@triton.jit
def rows(
    row_factor, point_factor, slot_plan, slot_column, pair_start, pair_count, supply, first_row, end_row, most_slots,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """a_i = s_i / sum_j P_ij b_j."""
    for base in range(first_row, end_row, ROWS):
        g, begin, count = _row_tile(pair_start, pair_count, base, end_row, ROWS)
        k = tl.load(supply + g, mask=g < end_row, other=0)
        sent = tl.zeros([ROWS], tl.float32)
        for d in range(0, most_slots, SLOTS):
            lane = d + tl.arange(0, SLOTS)[None, :]
            plan = tl.load(slot_plan + begin + lane, mask=lane < count, other=0.0)
            column = tl.load(slot_column + begin + lane, mask=plan > 0.0, other=0)
            sent += tl.sum(plan * tl.load(point_factor + column, mask=plan > 0.0, other=0.0), 1)
        tl.store(row_factor + g, k.to(tl.float32) / sent, mask=k > 0)


@triton.jit
def absorb(potential, factor, first, end, BLOCK: tl.constexpr):
    """Move factors into potentials."""
    for base in range(first, end, BLOCK):
        i = base + tl.arange(0, BLOCK)
        moved = tl.load(potential + i, mask=i < end, other=0.0)
        moved += tl.log2(tl.load(factor + i, mask=i < end, other=1.0)).to(tl.float64)
        tl.store(potential + i, moved, mask=i < end)


@triton.jit
def largest(x, size, BLOCK: tl.constexpr):
    """Maximum of `size` float64."""
    running = tl.full([BLOCK], LOWEST, tl.float64)
    for base in range(0, size, BLOCK):
        i = base + tl.arange(0, BLOCK)
        running = tl.maximum(running, tl.load(x + i, mask=i < size, other=LOWEST))
    return tl.max(running, 0)


@triton.jit
def row_peaks(
    peaks, v, slot_column, pair_cost, pair_start, pair_count, first_row, end_row, most_slots,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """max_j (v_j - c_ij): the logarithm of a row's largest entry, without the row's own potential."""
    for base in range(first_row, end_row, ROWS):
        g, begin, count = _row_tile(pair_start, pair_count, base, end_row, ROWS)
        peak = tl.full([ROWS], LOWEST, tl.float64)
        for d in range(0, most_slots, SLOTS):
            _, _, t = _slot_tile(v, slot_column, pair_cost, begin, count, d, SLOTS)
            peak = tl.maximum(peak, tl.max(t, 1))
        tl.store(peaks + g, peak, mask=g < end_row)


@triton.jit
def best_supplier(shift, edge_gt, edge_cost, begin, end, most, NONE: tl.constexpr, LANES: tl.constexpr):
    """Smallest c_ij + shift_i of every point of a tile, and the lowest row that has it: edges are in rows' order."""
    least = tl.full([begin.shape[0]], float("inf"), tl.float64)
    supplier = tl.zeros([begin.shape[0]], tl.int32)
    for d in range(0, most, LANES):
        e, on, gt = _edge_tile(edge_gt, begin, end, d, LANES)
        cost = tl.load(edge_cost + e, mask=on, other=float("inf"))
        t = tl.load(shift + gt, mask=on, other=0.0) + cost.to(tl.float64)
        least_here = tl.min(t, 1)
        first_of_equals = tl.min(tl.where(t == least_here[:, None], gt, NONE), 1)
        supplier = tl.where(least_here < least, first_of_equals, supplier)
        least = tl.minimum(least_here, least)
    return least, supplier
