"""The policy on its devices: what the loop calls, and what it hands over.

stage     a stage, its reward's weights, and the batch that a rollout leaves for the update
learner   the policy in its three roles: trained, sampled from, referred to
world     the processes that take part
policies  policies loaded for training or for use, in the right dtype
lora      adapters in PEFT's layout
offload   AdamW whose moments stay in the host's memory
plan      what a run needs of a GPU's memory
"""
