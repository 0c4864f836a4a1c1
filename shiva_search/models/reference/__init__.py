"""fashion-dit, the built-in model: its data, its scoring classifier, its weights and the recipe of all three."""
