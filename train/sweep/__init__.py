"""The sweep engine: many runs as one program, many programs side by side, and one store that they all report to."""
