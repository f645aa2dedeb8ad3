"""Processes that form a group, gloo's, and run what they are told together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from forked import FORKED

GROUPS: dict[int, dist.ProcessGroup] = {}
"""In a process of `Several`: the group of the first so many."""


def _serve(rank: int, count: int, path: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # what nobody wrote is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=count)
    for size in range(1, count + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            GROUPS[size] = group
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(function(rank, *arguments))
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()


class Several:
    """`run` has the first so many processes call `function(rank, *arguments)`, a module's own."""

    def __init__(self, count: int, path: str):
        self.pipes, self.processes = [], []
        for rank in range(count):
            own, theirs = FORKED.Pipe()
            process = FORKED.Process(target=_serve, args=(rank, count, path, theirs), daemon=True)
            process.start()
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each has given. What one has raised is raised, with the others' in its notes."""
        for pipe in self.pipes[:count]:
            pipe.send((function, arguments))
        given = [pipe.recv() for pipe in self.pipes[:count]]
        raised = [x for x in given if isinstance(x, Exception)]
        for error in raised[:1]:
            for i, other in enumerate(given):
                error.add_note(f"process {i}: {other if other in raised else 'no error'}")
            raise error
        return given

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
