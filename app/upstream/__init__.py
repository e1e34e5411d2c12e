"""The HTTP client and its connections to engines."""
