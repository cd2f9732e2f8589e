"""Export and serving."""
