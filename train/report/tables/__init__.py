"""The tables of the report: a file per section has its data and its columns."""
