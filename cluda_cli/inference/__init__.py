"""All that evaluation and prediction need: sliding windows, scores, weights files, prefetching."""
