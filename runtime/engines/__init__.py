"""Inference libraries behind one interface."""
