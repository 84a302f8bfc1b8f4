"""Collect, train, evaluate, ablate and report: the only room that reads clocks and writes files of a run."""
