"""Training a stack of runs: the loop, a step, an evaluation."""
