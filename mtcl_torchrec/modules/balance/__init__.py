"""How tasks that share a model are kept from hurting each other: weights of their losses, surgery on their gradients."""
