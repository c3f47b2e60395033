"""Tracked runs, read from MLflow: as tables, compared, as committed figures and as a report."""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # MLflow's bars in a notebook; they are off

from mnist_lab.results.compare import compare, compare_pairs, compare_table, compare_text, median_run, newest_runs
from mnist_lab.results.runs import epoch_history, load_runs, predictions, run_table

__all__ = ["compare", "compare_pairs", "compare_table", "compare_text", "epoch_history", "load_runs"]
__all__ += ["median_run", "newest_runs", "predictions", "run_table"]
