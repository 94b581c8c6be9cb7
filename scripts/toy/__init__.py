"""A LLaVA small enough for two CPU cores, with pictures, and its recipe: for the demo, the study and the tests."""
