"""The results of runs: the record of an evaluation, and the folder that keeps them."""
