"""Training objectives: what a stage minimises, as sums over tokens."""
