"""Networks that are too large to be on every GPU: each keeps a part of the weights (FSDP2)."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class FullySharded(ModelParallelStrategy):
    """PyTorch's ``fully_shard`` over all processes; checkpoints are the files that a single GPU would write.

    The older FSDP, Lightning's ``fsdp``, makes all parameters one-dimensional, so that none would get weight decay, and
    cuts the moving average in other places than the network.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Keep a part of each parameter of ``network`` on each process, gathered stage by stage where it is needed.

    Args:
        network: with ``stages`` of blocks, or any other, which is gathered as a whole.
    """
    for stage in getattr(network, "stages", ()):
        fully_shard(stage, mesh=mesh)
    fully_shard(network, mesh=mesh)
