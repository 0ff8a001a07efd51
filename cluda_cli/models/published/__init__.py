"""Reading of checkpoints and encoder weights that others published."""
