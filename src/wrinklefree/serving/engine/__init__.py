"""Inference engines behind one small interface: whatever streams tokens for a prompt can be served."""
