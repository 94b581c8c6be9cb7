"""Bodies of the rows of `llava_patch`: each takes `original`, the function in whose place it stands, first."""
