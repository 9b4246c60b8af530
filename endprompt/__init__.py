"""The trainer: positions, prompts, RoPE scaling, data, model, loss, loop, checkpoints."""
