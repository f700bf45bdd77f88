"""What travels to a device in a bench bundle: scripts for Python 3.8 that need nothing of graphcomb."""
