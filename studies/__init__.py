"""Studies: strategies compared, exact transport plans, pictures of assignments."""
