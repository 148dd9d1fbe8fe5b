"""The commands of `egopatch extract`, one module each; those about a job's input files are in the room `inputs`.

Every module has `main(parser, args)`: it adds its options to the parser, runs, and returns the exit code. Only
`extract.__main__` imports them, each when its command is called.
"""
