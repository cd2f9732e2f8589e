"""The CPU engine of our own: packed ternary weights, training's own activation codes, one C call a step."""
