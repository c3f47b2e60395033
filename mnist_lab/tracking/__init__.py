"""Writes MLflow: the store, what a run logs there, and how it gets there when a server is away."""
