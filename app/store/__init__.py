"""The store: usage records and keys in a database, SQLite or PostgreSQL."""
