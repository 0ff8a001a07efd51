"""The drawn dataset that comes with the package."""
