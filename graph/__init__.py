"""The program, and everything that is known about it."""
