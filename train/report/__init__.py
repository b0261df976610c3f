"""The report of a results folder: tables, figures and one self-contained HTML page."""
