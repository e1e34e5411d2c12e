"""The ``frontline`` command, for the operator's terminal."""
