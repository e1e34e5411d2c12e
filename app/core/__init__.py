"""The words that all others use: tiers, prices, errors, settings. Imports no other package."""
