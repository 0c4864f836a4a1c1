"""What is saved: budgets, plans, profiles. No torch here."""
