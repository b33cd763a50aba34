"""How a model is spread over the processes of a run: `fully_shard`, PyTorch's own (FSDP2).

Every parameter is a float32 shard on each rank, the master that the optimiser moves; a block's weights are gathered in
the dtype of the forward pass when it runs, and its gradients are summed over the ranks in float32. One process in
float32 on a CPU stays as it is. `shard` decides, and nothing else asks.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ranks import Ranks


def is_sharded(ranks: Ranks, compute: torch.dtype) -> bool:
    """All runs are but one process that computes in float32 on a CPU. (bf16 needs float32 masters.)"""
    return ranks.world > 1 or ranks.device.type == "cuda" or compute != torch.float32


def shard(model: nn.Module, ranks: Ranks, *, compute: torch.dtype) -> nn.Module:
    """Shards `model` (a Transformer, on the meta device or not) in place, to be computed with in `compute`.

    Gradients are sums over ranks, not means: the loss says what a token weighs. With several nodes the shards are of
    one node, and nodes hold replicas.
    """
    if not is_sharded(ranks, compute):
        return model
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
    for part in model.modules():
        if isinstance(part, FSDPModule) and ranks.world > 1:  # on every one: the root's does not reach the blocks
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")  # training calls it, and the root's weights must be there
    return model


def reshard(model: nn.Module) -> None:
    """Back to shards: after a forward pass without a backward one the root's weights are whole."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a parameter, cast before it is gathered. Collective: all ranks ask for the same one."""
    p = p.detach() if dtype is None else p.detach().to(dtype)
    return p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def fill(p: Tensor, tensor: Tensor) -> None:
    """Copies the whole `tensor` into a parameter, every rank its own shard of it; nothing is sent."""
    if isinstance(p, DTensor):
        tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(tensor)
