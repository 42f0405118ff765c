"""Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, runs compiled kernels")
    if not torch.cuda.is_available():
        _patch_once_per_launch()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """On tensors this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def poisoned_memory():
    """torch.empty gives NaN and the largest integers, so that an output which is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def _patch_once_per_launch():
    """The interpreter patches triton.language anew at every call of a device function, half of its time in all."""
    try:
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):
        return
    patched = set()

    def patch_once(fn):
        if fn.__module__ in patched:
            return None
        patched.add(fn.__module__)
        return patch(fn)

    def launch_afresh(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
