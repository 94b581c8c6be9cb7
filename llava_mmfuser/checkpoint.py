"""Names of weights in adapters and checkpoints: LLaVA's, ours and the authors'."""

from typing import Any, Dict, Iterable

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


def describe_weights(source: Any, loaded_keys: Iterable[str], projector: Any) -> str:
    """Where the fuser's weights came from and how many of its tensors were there, for the log.

    Args:
        source: path or name that was loaded.
        loaded_keys: names of the tensors in it.
        projector: the `MMFuserProjector` that was loaded.
    """
    names = {name for name, _ in projector.fuser.named_parameters()}
    prefix = "mm_projector.fuser."
    missing = names - {key.split(prefix)[1] for key in loaded_keys if prefix in key}
    if not missing:
        return f"all {len(names)} tensors from {source}"
    if missing == names:
        return f"none of {len(names)} tensors is in {source}; starts as identity unless an adapter follows"
    return (
        f"WARNING: {len(missing)} of {len(names)} tensors are not in {source} and start as a fresh fuser's: "
        f"{', '.join(sorted(missing))}"
    )
