"""Whether a method helps: arms x seeds x budgets from one plan, their statistics and the report."""
