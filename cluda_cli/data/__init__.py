"""Datasets: class tables, what is on disk, and the stream of training batches."""
