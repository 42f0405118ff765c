"""A pytest plugin after that of ../shared/gpu_emulator, which runs compiled kernels in place of the interpreter's."""

from types import SimpleNamespace

import emulator
import pytest_emulated

# For NaN, which gt_offsets that fall can give, log2 leaves its warp for a moment.
pytest_emulated.ALLOWED += ("synccheck", "intra-warp")
_run = emulator._run


def _flat(kinds, values) -> list[tuple]:
    """Kinds and values of parameters; a tuple's members are parameters of their own in PTX."""
    pairs = []
    for kind, value in zip(kinds, values, strict=True):
        pairs += _flat(kind, value) if isinstance(kind, (tuple, list)) else [(kind, value)]
    return pairs


def _run_flat(session, kernel, *launch) -> None:
    parameters = _flat(kernel.src.signature.values(), launch[9:])
    names = {f"parameter {i}": kind for i, (kind, _) in enumerate(parameters)}
    flat = SimpleNamespace(src=SimpleNamespace(signature=names), asm=kernel.asm, metadata=kernel.metadata)
    _run(session, flat, *launch[:9], *(value for _, value in parameters))


emulator._run = _run_flat
