"""A run's folder and life cycle: created, locked, checkpointed, stopped, resumed."""
