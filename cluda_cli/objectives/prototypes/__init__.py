"""Parts of the prototype contrast: statistics of the classes, losses of pixels against them, the projection head."""
