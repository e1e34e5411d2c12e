"""The ledger: what every request cost, durably."""
