"""How much each index of each group matters."""
