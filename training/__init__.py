"""What the scripts need around the detector: flags and recipes, processes and signals, the folder of a run."""
