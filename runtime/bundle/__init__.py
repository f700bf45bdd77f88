"""Bench bundles: measuring on a device that has no graphcomb."""
