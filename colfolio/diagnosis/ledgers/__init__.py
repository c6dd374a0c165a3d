"""What a batch really is, counted before a run."""
