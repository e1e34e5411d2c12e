"""The wire formats: reading requests and answers, and rewriting them. Pure."""
