"""One engine replica: its launch, its other nodes, its guard, its ports."""
