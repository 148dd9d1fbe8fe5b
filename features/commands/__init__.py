"""The commands of `egopatch features`, one module each.

Every module has `main(parser, args)`: it adds its options to the parser, runs, and returns the exit code. Only
`features.__main__` imports them, each when its command is called. They import their tools when the command line has
been read: torch, Zarr and h5py take seconds, which neither help nor the error about a wrong option should.
"""
