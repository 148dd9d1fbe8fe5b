"""Operations that stage two's heads are built from, with no knowledge of heads, questions or stores.

`select_attend` and `philox` have kernels for a GPU; `largest`, `rows` and `stacked` are PyTorch alone.
"""
