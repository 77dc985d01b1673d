"""The folder of a run and its life: made, locked, stopped, checkpointed, resumed."""
