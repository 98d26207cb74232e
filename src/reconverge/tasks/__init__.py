"""Tasks that the loop of train.py can train, one file each.

A task says how a microbatch becomes the inputs of the model, what the loss of the model is, how the model is
evaluated, and what is drawn. The loop, the checkpoints and the logs know nothing of it.
"""
