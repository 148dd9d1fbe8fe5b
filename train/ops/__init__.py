"""Operations that stage two's heads are built from, with no knowledge of heads, questions or stores.

Other rooms use `select_attend` and `choose_implementation` from `select_attend`, and `largest_mask` from `largest`.
"""
