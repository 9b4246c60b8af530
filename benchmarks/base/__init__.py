"""The project's two small base models: the text they learn, how they are made; their checkpoints."""
