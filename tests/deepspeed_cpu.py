"""What LLaVA's train_mem.py does, on the CPU: it only calls `train()`, here with the work-arounds that DeepSpeed 0.16
needs without a GPU. Nothing of LLaVA is changed; FlashAttention, which train_mem.py asks for, needs a GPU.
"""

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

if __name__ == "__main__":
    from llava.train.train import train

    train()
