"""The commands of `egopatch train`, one module each.

Every module has `main(parser, args)`: it adds its options to the parser, runs, and returns the exit code.
"""
