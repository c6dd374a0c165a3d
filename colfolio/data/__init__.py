"""Documents to views and pairs, and datasets in the ViDoRe/BEIR layout; knows nothing of models."""
