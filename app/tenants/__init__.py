"""API keys: whose request it is, its rate limits, and its share of priority."""
