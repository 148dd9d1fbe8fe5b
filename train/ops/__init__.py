"""Operations that stage two's heads are built from."""
