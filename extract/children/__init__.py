"""Child processes of a job: `spawned` starts and ends them, `ring` is memory that they share with their parent."""
