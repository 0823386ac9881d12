"""Domain errors: each message says what was expected, what came, and what to do.

All derive from :class:`EntpruneError`, which is what the command line turns into one sentence and a non-zero exit.
"""

from __future__ import annotations


class EntpruneError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(EntpruneError):
    """A setting or budget lies outside its range."""


class ModelError(EntpruneError):
    """A model specification is unknown, or the network cannot be analysed or pruned."""


class CheckpointError(EntpruneError):
    """A checkpoint is missing, unsafe to load, or does not fit the network."""


class DataError(EntpruneError):
    """A data specification is unknown, or the images or labels are unusable."""


class ArtifactError(EntpruneError):
    """A saved model is missing, damaged, or of an unknown format version, or a network cannot be exported."""


class OutputError(EntpruneError):
    """The output folder cannot be written."""


class CertificateError(EntpruneError):
    """The smaller network does not equal the masked full-size one."""


class EngineError(EntpruneError):
    """The cluster, the tracking server or the flow engine cannot do what was asked."""
