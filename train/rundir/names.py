"""Names of the files of runs and sweeps, for all code that writes, reads or looks for them."""

# In a run's folder.
CARD, CONFIG, WEIGHTS, LAST = "card.json", "config.yaml", "best.safetensors", "last.pt"
LOG, BOARD, TRACKING = "log.jsonl", "tb", "tracking.json"
CLIPS, QUESTIONS = "clips.json", "questions.json"
TEST, PREDICTIONS, SELECTION = "test.json", "predictions.jsonl", "selection.npz"
SUBMISSION, SUBMISSION_CSV = "submission.json", "submission.csv"

# Below the table's folder, and in a sweep's. The groups' folder keeps the former name of run groups.
SWEEPS, GROUPS = "sweeps", "crews"
SWEEP, SWEEP_CSV, SWEEP_PNG = "sweep.json", "sweep.csv", "sweep.png"
