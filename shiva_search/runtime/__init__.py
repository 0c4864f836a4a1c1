"""Put a plan on a model: hooks on, hooks off, token movement in between."""
