"""The importance of each index of each group."""
