"""What the trials say: figures, report and plots. Needs no Ax."""
