"""The program back in the class of the user."""
