"""Several settings over several seeds: the runs, the table and the plot. scripts/ablate.py is its command line."""
