"""The networks, and the forward pass of their layers for stacked runs."""
