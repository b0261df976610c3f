"""What the optimizers share: from param groups to one launch of the update kernel."""
