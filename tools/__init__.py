"""Programs around the trainer; each imports rules from it, it knows of none."""
