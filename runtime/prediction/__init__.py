"""Latency of a program that was not measured: tables, rooflines, fits to what a device measured."""
