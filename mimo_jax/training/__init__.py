"""Training small models of the family from scratch: text to learn from, and what is done with it."""


class TrainingError(ValueError):
    """Training that cannot begin or go on; says what is wrong and what is left."""
