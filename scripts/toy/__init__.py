"""A LLaVA small enough for two CPU cores, with pictures, and LLaVA's recipe at its size.

Used by scripts/demo.py, by the ablation and by the tests.
"""
