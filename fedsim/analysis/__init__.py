"""Analysis of runs: certified references, closed forms and metrics, none of which needs a federation to run."""
