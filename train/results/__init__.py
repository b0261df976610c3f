"""What a run is when it is done, and the folder that keeps it."""
