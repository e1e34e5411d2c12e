"""The ``frontline`` command: what runs in the operator's terminal."""
