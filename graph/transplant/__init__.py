"""The program in the user's own class."""
