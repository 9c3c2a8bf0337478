import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, with the reason."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch finds no CUDA device here; run `make gpu` with one")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)
