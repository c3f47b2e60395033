"""MLflow, written: the store, what a run leaves there, and how it gets there when a server is away."""
