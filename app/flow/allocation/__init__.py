"""The Model's part of flow control: how many slots each ingress may use. Pure."""
