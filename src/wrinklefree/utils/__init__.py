"""Bottom layer: named jobs that know nothing of models or training (config, errors, storage, assets...)."""
