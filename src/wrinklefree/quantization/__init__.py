"""Pure tensor functions: ternary weights, integer activations, straight-through estimator, schedules."""
