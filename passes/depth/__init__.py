"""Removal of whole blocks: which there are, what they save, how they fade and what stands in their place."""
