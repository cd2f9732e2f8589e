"""One decoder for Llama, SmolLM2, Qwen2.5 and Qwen3, full precision or ternary."""
