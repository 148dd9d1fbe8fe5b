"""Child processes of a job: `spawned` starts and ends them, `slots` is memory that they share with their parent."""
