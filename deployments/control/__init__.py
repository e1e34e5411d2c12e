"""The Model's knowledge of its pools: what can be placed, what is away, whom to wake."""
