"""Training of one stage: engine, checkpoints, loop, and the command line of a rank."""
