"""The same work for many items, here or in worker processes, with the same results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mvmr.data.decode import UnreadableImage
from mvmr.errors import RunError, UserError

Item = TypeVar("Item")
Made = TypeVar("Made")


class _Failed:
    """An error with a message for the user, on its way to the main process."""

    def __init__(self, error: Exception):
        self.error = error


class _Tasks(Dataset, Generic[Item, Made]):
    def __init__(self, task: Callable[[Item], Made]):
        self.task = task

    def __getitem__(self, item: Item) -> Made | _Failed:
        try:
            return self.task(item)
        except (UserError, RunError, UnreadableImage) as error:
            return _Failed(error)


def in_workers(task: Callable[[Item], Made], items: Sequence[Item], *, workers: int) -> Iterator[Made]:
    """task(item) for every item, in their order; `workers` 0 does it here. Workers start at the first one asked for.

    Every task runs with one thread, so that results do not depend on where it runs, and the global random state of
    torch is left alone. Raises RunError when a worker dies (usually for want of memory), else what the task raised.
    """
    if workers == 0 or len(items) == 0:
        for item in items:
            with _one_thread():
                made = task(item)
            yield made
        return
    with warnings.catch_warnings():
        # A recipe made for a larger machine runs here too, and more workers than cores are a user's choice.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Tasks(task), sampler=items, batch_size=None, num_workers=workers, collate_fn=_as_it_is,
            generator=torch.Generator(),
        )  # fmt: skip
        # Python 3.12 warns of every fork beside threads; the workers use one thread and none of the parent's locks.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise RunError(
                f"a process that reads images ended unexpectedly ({error}). Usually memory or shared memory ran out: "
                "set a smaller data.workers (0 reads in the main process) or a smaller data.batch_size"
            ) from None
        if isinstance(result, _Failed):
            raise result.error
        yield result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _as_it_is(made: Any) -> Any:
    return made
