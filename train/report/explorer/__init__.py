"""`explore.html`: all runs of a results folder, interactive, on one page that needs no network."""
