"""Which tokens are kept, and how that choice learns: scores in, kept tokens and gradients for router and k out."""
