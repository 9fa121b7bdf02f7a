"""What the GPU tests need before CUDA starts."""

import os

# cuBLAS repeats its results only with a workspace of fixed size; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
