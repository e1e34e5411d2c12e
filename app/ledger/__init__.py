"""The ledger: a durable record of the usage and cost of every request.

``record`` defines the record, and ``ledger`` is the interface for requests. ``journal``, ``codec``
and ``segments`` store records on disk, and ``flusher`` moves them to the database.
"""
