"""Documents to a dataset: sources, shards, splits, duplicates, and the work in between."""
