"""Memory that does not grow with context length times vocabulary."""
