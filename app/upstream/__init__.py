"""HTTP out: the connections to engines."""
