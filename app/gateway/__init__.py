"""HTTP in: one request from its socket to the last byte of its answer."""
