"""Removal of channels that zeros in weights have made useless."""
