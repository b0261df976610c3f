"""The common part of the optimizers: from param groups to one launch of the update kernel."""
