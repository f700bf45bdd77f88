"""Bench bundles measure models on a device without graphcomb: write one (write) and run it (run)."""
