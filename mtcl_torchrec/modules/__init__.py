"""The modules of the model, in the order data meets them."""
