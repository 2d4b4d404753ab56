"""Precision of matrix products."""

from __future__ import annotations

import torch


def sum_products_in_fp32() -> None:
    """Sums of matrix products in fp32, on CUDA also those of bf16 and fp16 factors, and no TF32 for fp32.

    By default cuBLAS may add the parts of a bf16 product in bf16, and containers may have turned TF32 on.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
