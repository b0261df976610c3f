"""The networks, and their layers for many runs at once."""
