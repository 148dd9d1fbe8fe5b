"""What a job would do, without doing it: its size and duration (`plan`, `forecast`), and faults in its data (`doctor`).

Other rooms use `plan.make_plan`, `forecast.make_forecast`, `plan.disk_refusal` and `doctor.examine`.
"""
