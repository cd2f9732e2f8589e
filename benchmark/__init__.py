"""Short trials that compare training configurations for speed and memory."""
