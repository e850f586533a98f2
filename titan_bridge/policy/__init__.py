"""How each layer of a model is split over its ranks: a policy, what it resolves to, and what is refused."""
