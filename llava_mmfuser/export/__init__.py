"""Checkpoints outside LLaVA's code: transformers' own format, with the block as code in the folder, and the way back.

``modeling_llava_mmfuser`` is what a folder carries beside a copy of ``block``, ``names`` what weights are called there,
``folder`` the way out, ``native`` what starts from a folder of transformers' format, ``card`` the model card.
"""
