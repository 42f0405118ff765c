"""Cost of the parts, reported only after their results have been shown to be right."""
