"""Datasets on disk and on the hub: the ViDoRe/BEIR layout, CSV and JSONL, checks, safe writing."""
