"""The `transformers` classes of models that no stock class holds; two of the files travel with every such export."""
