"""The claims of arXiv 2602.16642, each tested on the runs of a results folder: number, interval and verdict."""
