"""Flags and recipes, processes and signals, checkpoints and the folder of a run."""
