"""What a run computes: torch only, nothing of MLflow."""

# Names what a run computes: raise it with every change to the loops, the augmentations, the default loss, the hold-out
# or the layout in memory that changes any figure. Runs with different recipes are not averaged.
RECIPE = 1
