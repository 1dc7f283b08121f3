"""Generation: chains of rewriting steps through the expert, shared by workers as work units."""
