"""The trainer: data, models, the training loop, grids, the store, the report and the command line."""
