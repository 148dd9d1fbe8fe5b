"""The folder of one run: `run_folder` has config and weights, `card` the model card, `log` the training log, which
`tracking` sends to a tracker too, `resume` the state to resume from, and `trained_on` what the clips were made of.
`lease` lets one process at a time write, `results` reads finished runs, `checked_json` checks what JSON files hold, and
`names` has the names of all files.
"""
