"""The Model's half of flow control: which ingress may use how many slots. Pure."""
