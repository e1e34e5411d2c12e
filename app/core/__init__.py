"""Vocabulary of all packages: tiers, prices, errors, settings. Imports no other package."""
