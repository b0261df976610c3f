"""Train a stack of runs: the loop, one step, the evaluation."""
