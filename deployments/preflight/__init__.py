"""Looks at a machine before an engine is started there: facts, arithmetic, findings."""
