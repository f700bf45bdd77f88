"""How many indices each group of channels keeps."""
