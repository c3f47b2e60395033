"""Numbers in, words out: what was shown, and what was not. Nothing here knows MLflow or the training."""
