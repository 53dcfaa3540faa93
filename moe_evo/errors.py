"""Every error that moe_evo raises on purpose: one base class, few leaves, each also a builtin.

A message says where, what was got, what was expected and what to do, in one line; the command line
prints that line and exits with code 2.
"""


class MoeEvoError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(MoeEvoError, ValueError):
    """A config file, a flag or a combination of them asks for something impossible."""


class GenomeError(MoeEvoError, ValueError):
    """A genome, or a file that should hold one, is not well formed or does not fit the model."""


class ModelError(MoeEvoError, ValueError):
    """A model cannot be loaded, is not a supported Mixture-of-Experts model, or misbehaves."""


class OutOfMemory(ModelError):
    """An evaluation needs more memory than the device has."""


class RowOutOfMemory(OutOfMemory):
    """A single row needs more memory than the device has, so that no smaller batch can help."""


class TaskError(MoeEvoError, ValueError):
    """Task data are missing, malformed or too few."""


class ObservationError(MoeEvoError, ValueError):
    """Observations of a model, or a file that should hold them, are not well formed or do not fit."""


class JournalError(MoeEvoError, RuntimeError):
    """The journal of a run cannot be read or written."""


class ClusterError(MoeEvoError, RuntimeError):
    """A Ray cluster cannot be reached, has no resources for a gang, or no gang of it can load the model."""


class RunError(MoeEvoError, RuntimeError):
    """A run folder cannot be used for what was asked."""


class ExportError(MoeEvoError, RuntimeError):
    """A checkpoint cannot be exported, or the export does not compute what was evaluated."""
