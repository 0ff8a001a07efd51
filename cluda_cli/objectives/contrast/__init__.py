"""The tiled kernel of the pixel contrast."""
