"""What exists for machines without a GPU alone."""
