"""What can go wrong, in the service's own words. Status codes are given to these in `front`."""

# Texts that several refusals end with, or are.
BACK_OFF = "back off, then retry"
SHUTTING_DOWN = "this server is shutting down: retry, another may answer"


class ConvoyError(Exception):
    """An answer that is a no; its text is for the caller and says what to do."""


class InvalidRequest(ConvoyError):
    """The request is wrong as it stands: sending it again will not help."""


class InvalidImage(InvalidRequest):
    """An image that can't be read, or is larger than is allowed."""


class UnknownModel(ConvoyError):
    """No model or version of that name is served here."""


class UnknownRegion(ConvoyError):
    """No shared memory of that name is registered."""


class AlreadyThere(ConvoyError):
    """The name is taken: give it free, or take another one."""


class NotAllowed(ConvoyError):
    """The operator of this server does not let callers do that."""


class NotPossible(ConvoyError):
    """An order that can't be carried out as things are."""


class Unsupported(ConvoyError):
    """The protocol has it, this server has not."""


class Overloaded(ConvoyError):
    """More is waiting than can be taken on: back off for `retry_after_s` seconds, then retry."""

    def __init__(self, words: str, retry_after_s: float = 0.1) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class NotReady(ConvoyError):
    """Starting, draining, or without a working version: another replica may answer."""


class DeadlineExceeded(ConvoyError):
    """The caller's deadline passed before the answer was there."""


class Cancelled(ConvoyError):
    """The caller took the request back, or has gone."""


class InferenceFailed(ConvoyError):
    """The device gave no usable answer. What happened is in the log, not in this text."""


class BrokenVersion(ConvoyError):
    """A version folder that is incomplete, damaged, or does not prove itself."""

    @property
    def passing(self) -> bool:
        """What is wrong is not the version but the machine: it may work another time as it is."""
        return isinstance(self.__cause__, (OSError, MemoryError))
