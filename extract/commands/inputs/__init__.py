"""The commands that write or inspect what a job reads, one module each: data sets, checkpoints, frames of a video."""
