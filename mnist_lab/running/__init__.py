"""From a declaration to a finished run, or a study over seeds."""
