"""Draws the maps that a fuser reads, the map that it makes, and its samples: `python -m llava_mmfuser visualize`."""
