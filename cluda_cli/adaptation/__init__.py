"""Self-training: the teacher, class mixing with strong augmentation, and the views that a step trains on."""
