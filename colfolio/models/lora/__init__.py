"""Low-rank adapters by peft: where they go, their layers, their files."""
