from __future__ import annotations

import os
import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is kept in, or taken from, the cache of whoever runs the tests."""
    os.environ["MVMR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # A warning is an error in the tests, and here it would end the whole process: a driver that does not answer means
    # only that there is no GPU.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch  # not at the top: tests that need no torch start without it

        there_is_one = torch.cuda.is_available()
    if not there_is_one:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
