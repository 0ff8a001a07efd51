"""The processes that train one run: starting them, and the collectives between them."""
