"""What runs: the pruning flow and the command line. Composition only, no tensors."""

from flows.environment import set_defaults

set_defaults()  # here, because every module of this package may be the first to import an engine
