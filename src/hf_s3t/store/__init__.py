"""The store: its files, its private state, and deletion."""
