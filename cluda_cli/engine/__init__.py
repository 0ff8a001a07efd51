"""Training: the step, the state of a run, and the folder that keeps it."""
