"""Every error a user can act on, by who can mend it.

    EdgelocalError                    exit code
    |-- UsageError                    2   the command or its arguments
    |   |-- ExportError               2   the network given to export
    |   `-- RuntimeMissingError       2   the installation (no ONNX Runtime, or one too old)
    |-- BudgetError                   3   does not fit the memory budget
    |   `-- OverBudgetError           3   ... as it turned out while training
    |-- RefusedError                  4
    |   |-- BundleError               4   the bundle is damaged, foreign or too new
    |   `-- CheckpointError           4   the run or its checkpoint is damaged or belongs to another bundle
    |-- DataError                     5   the samples or labels
    |-- DivergedError                 6   the loss is no longer finite
    |-- InterruptedRunError           7   stopped by a signal after a commit; the run can be resumed
    `-- StorageError                  8   the disk refused a write (full, read-only, quota)

Anything else that reaches the command line is a bug and exits with 1.
A message says what was found, what was expected and what to do next.
"""

from __future__ import annotations


class EdgelocalError(Exception):
    """Base of the tree. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(EdgelocalError):
    """The command or its arguments cannot be carried out as given."""

    exit_code = 2


class ExportError(UsageError):
    """The network given to `export` cannot be turned into a bundle."""


class RuntimeMissingError(UsageError):
    """No usable ONNX Runtime is installed."""


class BudgetError(EdgelocalError):
    """The work does not fit the memory budget."""

    exit_code = 3


class OverBudgetError(BudgetError):
    """Memory ran out, or over the budget, while training; the last commit is whole."""


class RefusedError(EdgelocalError):
    """Something read from disk is not what it should be."""

    exit_code = 4


class BundleError(RefusedError):
    """The bundle is damaged, incomplete, foreign or of a newer schema."""


class CheckpointError(RefusedError):
    """The run or its checkpoint is damaged, or belongs to another bundle."""


class DataError(EdgelocalError):
    """The samples or their labels cannot be used."""

    exit_code = 5


class DivergedError(EdgelocalError):
    """A loss or a weight is no longer finite; the last good state is kept."""

    exit_code = 6


class InterruptedRunError(EdgelocalError):
    """A signal ended the run after its state was committed."""

    exit_code = 7


class StorageError(EdgelocalError):
    """The disk refused a write; what was there before is whole."""

    exit_code = 8
