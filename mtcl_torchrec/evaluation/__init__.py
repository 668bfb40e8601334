"""Metrics of predictions, and the tables that show them."""
