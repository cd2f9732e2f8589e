"""WrinkleFree: pretrained language models in, 1.58-bit (ternary) language models out.

The package is layered; an import may only point down: training > distillation | data | serving > models >
quantization > utils. Package ``__init__`` modules import nothing, so reading a config never loads torch.
"""
