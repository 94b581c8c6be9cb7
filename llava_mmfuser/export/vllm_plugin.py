"""vLLM's entry point (group ``vllm.general_plugins``): it knows an exported folder without trusting its code."""


def register() -> None:
    """Tell vLLM of `vllm_model`, which it imports once a folder asks for it."""
    from vllm import ModelRegistry

    name = "LlavaMMFuserForConditionalGeneration"
    ModelRegistry.register_model(name, f"{__package__}.vllm_model:{name}")
