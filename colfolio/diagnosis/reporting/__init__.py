"""One HTML file on a run: curves, scores, heat maps, and what the diagnosis says."""
