"""Child processes of a job: `spawned` starts and ends them, `limits` ends those that take too much time or memory, and
`slots` is memory that they share with their parent.
"""
