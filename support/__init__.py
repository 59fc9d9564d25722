"""What keeps days of work safe and what people look at; the method itself is in the files above this folder.

run       settings, the run's folder, checkpoints, interrupts
learner   processes, devices, the policy in its roles, LoRA, the memory plan
datasets  readers, splits, image files, drawings, the next steps' prompts, the look at a data set
show      metrics, curves, sheets, results, model card
rank      the command that ranks a folder of images
"""
