"""What the probe does step by step: the calls, the guesses, the checks."""
