"""An OpenAI-compatible HTTP endpoint over the engine, for programs of this machine."""
