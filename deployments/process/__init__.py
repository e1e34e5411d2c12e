"""Engine processes: starting, watching, logging, and ending them with all descendants."""
