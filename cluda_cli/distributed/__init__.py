"""Several processes that train one run: launching them and their collectives."""
