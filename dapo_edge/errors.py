"""Every error that dapo-edge raises on purpose. The message names the cause, then the remedy.

DapoEdgeError                exit 1    a run-time error
├── BackendError                       an inference runtime refused or failed
├── OutputError                        a result can't be written (folder, permission, disk full)
├── RecipeError              exit 2    a recipe, an option or an argument is wrong
├── PackageError             exit 3    an engine package can't be used
│   ├── PackageDamaged                 a file is missing, truncated or edited
│   └── PackageIncompatible            made by a newer dapo-edge, or for another target
├── GateError                exit 4    a compiled precision failed the accuracy gate
├── SourceError              exit 5    a camera, video or folder can't be opened
│   ├── FrameError                     one frame can't be used; the frames after it can
│   ├── FrameTimeout                   no frame came in time; the source is still open
│   └── SourceRefused                  asking again can't help: credentials, permission, pixel format, unknown feature
├── DeadlineError            exit 6    a deadline that can't be met, or was missed
└── DependencyMissing        exit 7    an optional package, or downloadable weights, are not there
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, valid: Iterable[str], *, cutoff: float = 0.4) -> str:
    """`Did you mean 'x'? ` for the nearest valid name, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"Did you mean '{near[0]}'? " if near else ""


class DapoEdgeError(Exception):
    """Base class. `cause` says what is wrong, `remedy` what to do about it; `str()` is both in one line."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause = " ".join(cause.split()).rstrip(".")
        self.remedy = " ".join(remedy.split()).rstrip(".")
        super().__init__(f"{self.cause}. {self.remedy}.")

    def __reduce__(self) -> tuple[type[DapoEdgeError], tuple[str, str]]:
        """Errors come back from worker processes, too."""
        return type(self), (self.cause, self.remedy)


class BackendError(DapoEdgeError):
    """An inference runtime refused the encoder or failed while running it."""


class OutputError(DapoEdgeError):
    """A result can't be written."""

    @classmethod
    def refused(cls, path: object, error: Exception) -> OutputError:
        """The operating system's refusal to write to `path`, with what to do about it."""
        remedies = {
            errno.ENOSPC: "Free some space, or write to another disk",
            errno.EDQUOT: "Free some of your quota, or write to another disk",
            errno.EROFS: "The disk is mounted read-only; write to another place",
        }
        remedy = "Check the folder and its permissions, or choose another place"
        reason = getattr(error, "strerror", None) or error
        return cls(f"'{path}' can't be written ({reason})", remedies.get(getattr(error, "errno", None) or 0, remedy))


class RecipeError(DapoEdgeError):
    """A recipe, an option or an argument is wrong."""

    exit_code = 2


class PackageError(DapoEdgeError):
    """An engine package can't be used."""

    exit_code = 3


class PackageDamaged(PackageError):
    """A file of an engine package is missing, truncated or edited."""


class PackageIncompatible(PackageError):
    """An engine package was made by a newer dapo-edge, or for something else."""


class GateError(DapoEdgeError):
    """A compiled precision differs too much from the eager reference."""

    exit_code = 4


class SourceError(DapoEdgeError):
    """A frame source can't be opened or broke down."""

    exit_code = 5


def sources_error(errors: Sequence[DapoEdgeError]) -> DapoEdgeError:
    """What went wrong with one source or more: a single error as it is, several as one that names every cause."""
    if len(errors) == 1:
        return errors[0]
    return SourceError("; ".join(error.cause for error in errors), errors[0].remedy)


class FrameError(SourceError):
    """One frame can't be used. The source goes on with the next frame."""

    index: int | None = None  # of the frame within its source, where the source knows it
    source: str | None = None  # the frame's own URI

    def at(self, index: int, source: str) -> FrameError:
        """This error, with the place of the frame."""
        self.index, self.source = index, source
        return self


class FrameTimeout(SourceError):
    """No frame came within the time that the reader gave. The source is open, and may be asked again."""


class SourceRefused(SourceError):
    """A source can't be opened as it is asked for, and would refuse again: somebody must change something."""


class DeadlineError(DapoEdgeError):
    """A deadline can't be met, or was missed."""

    exit_code = 6


class DependencyMissing(DapoEdgeError):
    """An optional package, or weights that would be downloaded, are not available."""

    exit_code = 7
