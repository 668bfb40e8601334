"""How tasks that share a model are kept from hurting each other: weights of losses, surgery on gradients."""
