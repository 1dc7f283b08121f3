"""Where a run stands and what came of it: status, checks, and the HTML report."""
