"""Channels that zeros leave without a purpose."""
