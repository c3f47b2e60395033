"""From a picture to a digit."""
