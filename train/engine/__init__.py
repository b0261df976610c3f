"""The sweep: runs are stacked into programs, which train side by side and report to one store."""
