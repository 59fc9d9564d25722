"""What keeps days of work safe: from the command line to the run's folder and back.

settings       every setting of train.py, in groups, and the presets
eval_settings  those of eval.py
preflight      items, prompts and memory are checked before the first step
stage_run      what surrounds the steps of a stage: history, log, validation, checkpoints, the end on a signal
run_folder     runs/NAME: who owns it, what is complete, where to go on
checkpoints    weights and optimiser, whole or not at all, and the best policy of a stage
interrupts     SIGTERM, Ctrl-C, and processes that are lost
quiet_end      standard output that is closed or breaks, and no traceback on Ctrl-C
atomic_files   files and folders that are there whole or not at all
"""
