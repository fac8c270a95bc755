"""Which partition of a network to export for a memory limit: what it costs, what fits, what is best."""
