"""What a (model, guide) pair is: its sites, plates, rows, parameters and modules."""
