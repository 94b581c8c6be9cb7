"""What LLaVA's train_mem.py does, on the CPU: it only calls `train()`, here with the work-arounds that DeepSpeed 0.16
needs without a GPU. Nothing of LLaVA is changed; FlashAttention, which train_mem.py asks for, needs a GPU.
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
torch.cuda.synchronize = lambda *_: None  # train.py calls it before saving
for _name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "_all_gather_base"):

    def _waiting(collective):
        def call(*args, **kwargs):
            work = collective(*args, **kwargs)
            if kwargs.get("async_op") and work is not None:
                work.wait()  # ZeRO-3 on gloo reads weights before they have arrived
            return work

        return call

    if hasattr(dist, _name):
        setattr(dist, _name, _waiting(getattr(dist, _name)))

_initialize = deepspeed.initialize


def _initialize_and_say(*args, **kwargs):
    made = _initialize(*args, **kwargs)
    print("trains under ZeRO stage", made[0].zero_optimization_stage(), flush=True)
    return made


deepspeed.initialize = _initialize_and_say


def _compare_ranks(trainer):
    """Raise unless every trained weight is the same on all ranks."""
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                mine = parameter.detach().float().contiguous()
                others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
                dist.all_gather(others, mine)
                assert mine.numel() and all(torch.equal(mine, other) for other in others), name
    print("weights are the same on all ranks", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.train import train

    save_state = LLaVATrainer.save_state
    LLaVATrainer.save_state = lambda self: (_compare_ranks(self), save_state(self))
    train()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends normally
