"""The program and what we know about it."""
