"""Names of weights in adapters and checkpoints: LLaVA's, ours and the authors'."""

from typing import Any, Dict, Iterable, List

# The authors' `mm_projector` is Sequential(fuser, Linear, GELU, Linear); ours keeps the MLP at LLaVA's own 0 and 2.
_MLP = {"1.weight": "0.weight", "1.bias": "0.bias", "3.weight": "2.weight", "3.bias": "2.bias"}


def rename_published(state_dict: Dict[str, Any], prefix: str = "") -> None:
    """Give the tensors of an authors' adapter our names, in place; leave every other state dict alone.

    Args:
        state_dict: names to tensors.
        prefix: what stands before the names of the projector, such as ``model.mm_projector.``.
    """
    if prefix + "0.gamma1" not in state_dict:
        return
    for key in [key for key in state_dict if key.startswith(prefix + "0.")]:
        state_dict[prefix + "fuser." + key[len(prefix) + 2 :]] = state_dict.pop(key)
    for theirs, ours in _MLP.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)


def missing_fuser_keys(loaded_keys: Iterable[str], projector: Any) -> List[str]:
    """Names of the fuser's parameters that a checkpoint of a whole model lacks, sorted.

    Args:
        loaded_keys: names of the tensors in the checkpoint.
        projector: the `MMFuserProjector` that was loaded.
    """
    prefix = "mm_projector.fuser."
    there = {key.split(prefix)[1] for key in loaded_keys if prefix in key}
    return sorted(name for name, _ in projector.fuser.named_parameters() if name not in there)
