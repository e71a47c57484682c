"""Runs a test's function on several gloo ranks.

Importing torch takes seconds per process, so the ranks of one pytest process live on and serve all its distributed
tests; the first failure ends them, and the next call starts fresh ones.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

LIMIT_SECONDS = 90.0  # for one call, and as much again for the ranks to start
GRACE_SECONDS = 5.0  # for the other ranks' own tracebacks once one has failed


def averaged_gradients(module: Any, world_size: int) -> dict[str, Any]:
    """{trained parameter: its gradient, averaged over ranks as DDP does}; every one must have one."""
    from torch import distributed  # the parent process of the ranks starts without torch

    found = {}
    for key, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        if world_size > 1:
            distributed.all_reduce(parameter.grad)
        found[key] = parameter.grad / world_size
    return found


@dataclass(frozen=True)
class _Rank:
    process: Any
    connection: Connection


@dataclass(frozen=True)
class _Pool:
    ranks: list[_Rank]
    folder: tempfile.TemporaryDirectory[str]
    """Where the ranks meet; goes with the pool."""


_pools: dict[int, _Pool] = {}


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """[function(rank, *args) for every rank], each in a process of its own, joined in a gloo group.

    function: any module's top-level function, also a test module's. Arguments and results are pickled.
    Raises RuntimeError with the ranks' tracebacks, or after LIMIT_SECONDS.
    """
    file = inspect.getsourcefile(function)
    task = pickle.dumps((function.__module__, os.path.abspath(str(file)), function.__qualname__))
    if world_size not in _pools:
        _pools[world_size] = _start(world_size)
    pool = _pools[world_size]
    try:
        for rank in pool.ranks:
            rank.connection.send_bytes(task)
            rank.connection.send_bytes(pickle.dumps(args))
        return _answers(pool.ranks, LIMIT_SECONDS)
    except BaseException:
        _stop(_pools.pop(world_size))
        raise


def _start(world_size: int) -> _Pool:
    context = multiprocessing.get_context("spawn")
    pool = _Pool([], tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True))
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            meeting_point = os.path.join(pool.folder.name, "store")
            process = context.Process(target=_serve, args=(rank, world_size, meeting_point, theirs), daemon=True)
            process.start()
            theirs.close()
            pool.ranks.append(_Rank(process, ours))
        _answers(pool.ranks, LIMIT_SECONDS)  # each says that it has joined
    except BaseException:
        _stop(pool)
        raise
    return pool


def _stop(pool: _Pool) -> None:
    for rank in pool.ranks:
        rank.process.kill()
        rank.process.join()
        rank.connection.close()
    pool.folder.cleanup()


@atexit.register
def _stop_all() -> None:
    while _pools:
        _stop(_pools.popitem()[1])


def _answers(ranks: list[_Rank], limit: float) -> list[Any]:
    """What each rank sends back; a rank that ends or is silent too long counts as failed."""
    answers: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + limit
    waiting = {rank.connection: number for number, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures |= dict.fromkeys(waiting.values(), "no answer in time, perhaps because another rank failed")
            break
        for connection in ready:
            number = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                failed, content = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failed, content = True, "the process ended"
            (failures if failed else answers)[number] = content
            if failed:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RuntimeError("\n".join(f"rank {number}: {text}" for number, text in sorted(failures.items())))
    return [answers[number] for number in range(len(ranks))]


def _serve(rank: int, world_size: int, meeting_point: str, connection: Connection) -> None:
    """The life of one rank: join, then answer calls until the other end closes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    _answer(connection, _join, rank, world_size, meeting_point)
    while True:
        try:
            task, args = connection.recv_bytes(), connection.recv_bytes()
        except EOFError:
            return
        _answer(connection, _call, task, rank, args)


def _call(task: bytes, rank: int, args: bytes) -> Any:
    function = _function(*pickle.loads(task))  # first, because the arguments may be of its module's classes
    return function(rank, *pickle.loads(args))


def _answer(connection: Connection, call: Callable[..., Any], *args: Any) -> None:
    try:
        message = pickle.dumps((False, call(*args)))
    except BaseException:  # also pytest's own outcomes, which are no Exception
        message = pickle.dumps((True, traceback.format_exc()))
    connection.send_bytes(message)


def _join(rank: int, world_size: int, meeting_point: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT_SECONDS),
    )


def _function(module_name: str, file: str, name: str) -> Callable[..., Any]:
    """The function of that name; its module is loaded from its file, under the name that pytest gave it.

    pytest's importlib mode names test modules by their path from the root, which a new process cannot import by name.
    """
    if module_name not in sys.modules:
        try:
            importable = importlib.util.find_spec(module_name)
        except ModuleNotFoundError:
            importable = None
        if importable is not None and importable.origin == file:
            importlib.import_module(module_name)
        else:
            spec = importlib.util.spec_from_file_location(module_name, file)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
    return getattr(sys.modules[module_name], name)
