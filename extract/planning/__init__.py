"""What comes before a job: its size and duration (`plan`, `forecast`), and faults in its data and machine (`doctor`,
`machine`); for a folder of videos without annotations also its clips and its config (`own_videos`).
"""
