"""What people look at: how a run goes, and what a policy says.

monitor     the lines of a run's metrics, its time, progress, warnings, trackers, evidence of bad steps
curves      those metrics as curves, of one run or of several (a command of its own)
sheets      pictures of answers, of a group while it trains, of ranked images
results     tables of an evaluation, intervals, remarks, and what a policy that sees no image would get
model_card  what a run says at its end, and the README beside saved weights
"""
