"""Messages between processes, as plain values."""
