"""The ingress application: tiers, prices and the passage from an OpenAI client to an engine."""
