"""The laboratory: strategies compared, exact plans, pictures of assignments."""
