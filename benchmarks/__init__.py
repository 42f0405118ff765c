"""What the parts cost, measured only after they have been shown to be right."""
