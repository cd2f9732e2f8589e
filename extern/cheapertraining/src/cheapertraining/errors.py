"""The one error that this library raises for a reason outside its code."""


class CheaperTrainingError(ValueError):
    """A configuration, a data source or a model that cannot be worked with; one line that says what to do."""
