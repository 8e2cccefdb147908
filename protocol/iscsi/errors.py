"""Errors that end an iSCSI connection. A class with a ``status`` sends that in a login response
first.
"""


class IscsiError(Exception):
    """Root of the errors that a peer's bytes can cause; the connection catches it and ends."""


class ProtocolError(IscsiError):
    """The peer broke the protocol in a way that leaves the stream unusable: the connection is
    closed.
    """


class HeaderDigestError(ProtocolError):
    """A header's CRC32C is wrong. At error recovery level 0 that ends the connection (RFC 7143
    7.7).
    """


class TextError(IscsiError):
    """Text that is not ``key=value`` pairs, or breaks their limits."""


class LoginRefused(IscsiError):
    """The login ends with this status class (high byte) and detail (low byte), RFC 7143 11.13.5."""

    status: int = 0x0200


class AuthenticationFailed(LoginRefused):
    """The initiator could not be authenticated, or the target requires what it does not offer."""

    status = 0x0201


class TargetNotFound(LoginRefused):
    """There is no target of that name (or none that this initiator may know of)."""

    status = 0x0203


class UnsupportedVersion(LoginRefused):
    """The range of versions does not include 0."""

    status = 0x0205


class MissingParameter(LoginRefused):
    """InitiatorName or, for a normal session, TargetName is missing."""

    status = 0x0207


class SessionTypeUnsupported(LoginRefused):
    """SessionType is neither Normal nor Discovery."""

    status = 0x0209


class SessionDoesNotExist(LoginRefused):
    """The TSIH names no session."""

    status = 0x020A


class InvalidDuringLogin(LoginRefused):
    """A request that this stage of the login does not allow."""

    status = 0x020B


class OutOfResources(LoginRefused):
    """No session number is free."""

    status = 0x0302
