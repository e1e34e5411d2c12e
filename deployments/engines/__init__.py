"""One adapter module for each engine; ``registry`` knows them by name."""
