"""A training run: from a configuration to a finished checkpoint, resumable at any step."""

from endprompt.train.loop import Trainer
from endprompt.train.objective import Objective
from endprompt.train.run import extend

__all__ = ["Objective", "Trainer", "extend"]
