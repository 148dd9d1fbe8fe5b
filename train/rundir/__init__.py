"""The folder of one run: `run_folder` has config and weights, `card` the model card, `log` the training log, which
`tracking` also sends to a tracker, `resume` the state to resume from, and `trained_on` what a run was trained on.
`lease` lets one process at a time write, `results` reads finished runs, `checked_json` checks what JSON files hold, and
`names` has the names of all files.
"""
