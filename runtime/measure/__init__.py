"""Measured latencies, what they are of, and the gate that compares builds."""
