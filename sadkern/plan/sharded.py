"""One rank's share of a step under FSDP2, without the other ranks: what they would send has a size
and no contents either."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def ranks(count: int) -> Iterator[Any]:
    """`known_of` so many processes, of which this is the first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made = ShardingPropagator._propagate_tensor_meta_non_cached

    def aside(*arguments: Any) -> Any:
        """DTensor tries its operators on tensors of the whole size, which nobody holds."""
        with _disable_current_modes():
            return made(*arguments)

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        with _disable_current_modes():  # a mesh is of numbers
            mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("ranks",))
        with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", aside):
            yield known_of(mesh)
    finally:
        dist.destroy_process_group()


def known_of(mesh: DeviceMesh) -> Any:
    """What accelerate's FSDP2 asks an `Accelerator`, as in the recipes: layer by layer, each
    gathered again for its backward pass."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    return types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device(mesh.device_type),
        torch_device_mesh=mesh,
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names),
        is_main_process=mesh.get_rank() == 0,
    )
