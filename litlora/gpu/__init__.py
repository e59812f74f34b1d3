"""What a GPU computes in another way than a CPU, where one launch for many small things counts. Nothing here knows a model.

    packed.py     attention within each sample of a packed row, all of them at once

`kernels.py`, `quantized.py` and `model.py` ask here, at one place each, and have what is computed everywhere else beside it.
"""
