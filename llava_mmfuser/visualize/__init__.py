"""`python -m llava_mmfuser visualize`: what a fuser reads, what it makes of it, and where it looks."""
