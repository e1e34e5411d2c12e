"""The ledger: what every request cost, durably.

Read ``record`` for what is recorded, ``ledger`` for how requests use it, then ``journal``,
``frames`` and ``segments`` for how it is kept, and ``flusher`` for how it gets to the store.
"""
