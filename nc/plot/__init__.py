"""Pictures of a result and of runs, a function each; the report shows the same. They need matplotlib."""

from ncollapse.plot.collapse_panels import geometry

__all__ = ["geometry"]
