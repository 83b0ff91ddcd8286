"""What a run measures, and where the metrics go."""
