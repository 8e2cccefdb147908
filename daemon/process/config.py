"""Configuration: a TOML file, the command line, or both (the command line wins).

Every mistake is a ConfigError, one sentence that names the option, the value and what would be
right. docs/operations.md lists the options; deploy/cleaved.toml is a sample.
"""

import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from daemon import CONTROL_PATH_DEFAULT
from daemon.process.addresses import (
    WILDCARDS,
    Address,
    Endpoint,
    UnixAddress,
    is_loopback,
    parse_address,
)
from daemon.process.units import parse_size
from protocol.control.limits import CHAP_CHARACTERS_MAX, CHAP_SECRET_CHARACTERS_MIN
from storage.layout import BLOCK_BYTES, POOL_BLOCKS_MIN

CACHE_BYTES_MIN: Final = (
    8 << 20
)  # below this a single consistency point would push the working set out
# A Unix socket's address holds 108 bytes with the final zero (unix(7)).
CONTROL_PATH_BYTES_MAX: Final = 107
_POOL_BYTES_MIN: Final = POOL_BLOCKS_MIN * BLOCK_BYTES

Value = TypeVar("Value")


class ConfigError(Exception):
    """The configuration or the command line is wrong; the message names option, value, and what
    would be right.
    """


class _Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the file, as written there."""


class PoolSection(_Section, kw_only=True):
    """``[pool]``"""

    path: str
    size: str | None = None
    cache: str = "256MiB"
    soft_threshold_percent: Annotated[int, msgspec.Meta(ge=1, le=100)] = 80


class ChapSection(_Section, kw_only=True):
    """``[iscsi.chap]``: what initiators must know; the ``mutual`` pair is what the target then
    proves to them.
    """

    user: str
    secret: str
    mutual_user: str | None = None
    mutual_secret: str | None = None


class IscsiSection(_Section, kw_only=True):
    """``[iscsi]``"""

    listen: tuple[str, ...] = ("127.0.0.1:3260",)
    advertise: tuple[str, ...] = ()
    connections_max: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    open_access: bool | None = None
    physical_block_bytes: Literal[512, 4096] = 4096
    chap: ChapSection | None = None


class NbdSection(_Section, kw_only=True):
    """``[nbd]``"""

    listen: tuple[str, ...] = ()
    connections_max: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256


class ControlSection(_Section, kw_only=True):
    """``[control]``"""

    path: str = CONTROL_PATH_DEFAULT


class LogSection(_Section, kw_only=True):
    """``[log]``"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class FileLayout(_Section, kw_only=True):
    """The whole file."""

    pool: PoolSection
    iscsi: IscsiSection = msgspec.field(default_factory=IscsiSection)
    nbd: NbdSection = msgspec.field(default_factory=NbdSection)
    control: ControlSection = msgspec.field(default_factory=ControlSection)
    log: LogSection = msgspec.field(default_factory=LogSection)


class Chap(NamedTuple):
    """CHAP names and secrets for every target. ``mutual_*`` are None unless the target proves
    itself too.
    """

    user: str
    secret: str
    mutual_user: str | None
    mutual_secret: str | None


class Config(NamedTuple):
    """What the daemon runs with, checked."""

    pool_path: str
    pool_size_bytes: int | None
    cache_bytes: int
    soft_threshold_percent: int
    iscsi_listen: tuple[Address, ...]
    iscsi_advertise: tuple[Address, ...]
    connections_max: int
    open_access: bool
    physical_block_bytes: int
    chap: Chap | None
    nbd_listen: tuple[Endpoint, ...]
    nbd_connections_max: int
    control_path: str
    log_level: str
    log_format: str


def load_file(path: str) -> dict[str, Any]:
    """Tables of a TOML file, not yet checked. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror}; give the path of a readable TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def check_private(path: str) -> None:
    """Raise ConfigError where everybody on this machine can read, or change, a file that holds
    secrets.
    """
    if os.stat(path).st_mode & stat.S_IRWXO:
        raise ConfigError(
            f"--config {path} holds CHAP secrets, and others can open it; chmod 640 it, or use"
            " `cleavectl chap set` instead"
        )


def build(tables: dict[str, Any]) -> Config:
    """Check the tables of a file, or those made of the command line. Raises ConfigError."""
    try:
        found = msgspec.convert(tables, FileLayout)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), tables)) from None
    listen = _listen(found.iscsi.listen)
    nbd_listen = _nbd_listen(found.nbd.listen)
    return Config(
        pool_path=_not_empty("pool.path", found.pool.path),
        pool_size_bytes=(
            None if found.pool.size is None else pool_size_bytes("pool.size", found.pool.size)
        ),
        cache_bytes=_cache_bytes(found.pool.cache),
        soft_threshold_percent=found.pool.soft_threshold_percent,
        iscsi_listen=listen,
        iscsi_advertise=_advertise(found.iscsi.advertise),
        connections_max=found.iscsi.connections_max,
        open_access=_open_access(found.iscsi.open_access, listen, nbd_listen),
        physical_block_bytes=found.iscsi.physical_block_bytes,
        chap=None if found.iscsi.chap is None else _chap(found.iscsi.chap),
        nbd_listen=nbd_listen,
        nbd_connections_max=found.nbd.connections_max,
        control_path=_socket_path("control.path", found.control.path),
        log_level=found.log.level,
        log_format=found.log.format,
    )


def option_value(option: str, text: str, parse: Callable[[str], Value]) -> Value:
    """``parse(text)``; its ValueError becomes a ConfigError that names the option."""
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _listen(texts: tuple[str, ...]) -> tuple[Address, ...]:
    """At least one, and each once; port 0 is another one each time."""
    addresses = tuple(option_value("iscsi.listen", text, parse_address) for text in texts)
    if not addresses:
        raise ConfigError(
            "iscsi.listen: no address, so that nobody could use the pool; give one, as in"
            " 127.0.0.1:3260"
        )
    for address in addresses:
        if address.port and addresses.count(address) > 1:
            raise ConfigError(f"iscsi.listen: {address} stands there twice; give it once")
    return addresses


def _nbd_listen(texts: tuple[str, ...]) -> tuple[Endpoint, ...]:
    """Addresses, and paths of Unix sockets, which have a slash; each once."""
    endpoints = tuple(
        UnixAddress(_socket_path("nbd.listen", text))
        if "/" in text
        else option_value("nbd.listen", text, parse_address)
        for text in texts
    )
    for endpoint in endpoints:
        fixed = isinstance(endpoint, UnixAddress) or endpoint.port
        if fixed and endpoints.count(endpoint) > 1:
            raise ConfigError(f"nbd.listen: {endpoint} stands there twice; give it once")
    return endpoints


def _advertise(texts: tuple[str, ...]) -> tuple[Address, ...]:
    """What another machine can connect to."""
    addresses = tuple(option_value("iscsi.advertise", text, parse_address) for text in texts)
    for address in addresses:
        if not address.port or address.host in WILDCARDS or address.unscoped != address:
            raise ConfigError(
                f"iscsi.advertise: {address} is nothing to connect to; give an address and a port"
                " as initiators reach them"
            )
        if addresses.count(address) > 1:
            raise ConfigError(f"iscsi.advertise: {address} stands there twice; give it once")
    return addresses


def _open_access(
    wanted: bool | None, listen: tuple[Address, ...], nbd_listen: tuple[Endpoint, ...]
) -> bool:
    """Open where only this machine can come; elsewhere somebody must have said what is meant."""
    addresses: list[tuple[str, Endpoint]] = [
        *(("iscsi.listen", address) for address in listen),
        *(("nbd.listen", endpoint) for endpoint in nbd_listen),
    ]
    exposed = next(
        (
            f"{option}: {address}"
            for option, address in addresses
            if isinstance(address, Address) and not is_loopback(address.host)
        ),
        None,
    )
    if wanted is None and exposed is not None:
        raise ConfigError(
            f"{exposed} can be reached by other machines, and iscsi.open_access is"
            " not set; set it to false (--no-open-access) to let in only the initiators that"
            " `cleavectl acl add` names, or to true (--open-access) to let anybody use targets"
            " that have no such list"
        )
    return wanted is not False


def _not_empty(option: str, text: str) -> str:
    if not text or "\0" in text:
        raise ConfigError(
            f"{option}: {text!r} is not a path; give the path of a file or of a block device"
        )
    return text


def pool_size_bytes(option: str, text: str) -> int:
    """The size of a new pool. Raises ConfigError."""
    size_bytes = option_value(option, text, parse_size)
    if size_bytes < _POOL_BYTES_MIN:
        raise ConfigError(
            f"{option}: {text!r} is too small; at least {_POOL_BYTES_MIN >> 20}MiB are needed"
        )
    return size_bytes


def _cache_bytes(text: str) -> int:
    cache_bytes = option_value("pool.cache", text, parse_size)
    if cache_bytes < CACHE_BYTES_MIN:
        raise ConfigError(
            f"pool.cache: {text!r} is too small; at least {CACHE_BYTES_MIN >> 20}MiB are needed"
        )
    return cache_bytes


def _socket_path(option: str, text: str) -> str:
    path = _not_empty(option, text)
    if len(path.encode()) > CONTROL_PATH_BYTES_MAX:
        raise ConfigError(
            f"{option}: {path!r} is too long; a Unix socket's path has at most"
            f" {CONTROL_PATH_BYTES_MAX} bytes"
        )
    return path


def _chap(section: ChapSection) -> Chap:
    if (section.mutual_user is None) != (section.mutual_secret is None):
        raise ConfigError(
            "iscsi.chap: mutual_user and mutual_secret belong together; give both or neither"
        )
    for option in ("user", "mutual_user"):
        if getattr(section, option) == "":
            raise ConfigError(f"iscsi.chap.{option}: '' is not a name; give at least one character")
    for option in ("secret", "mutual_secret"):
        secret = getattr(section, option)
        if (
            secret is not None
            and not CHAP_SECRET_CHARACTERS_MIN <= len(secret) <= CHAP_CHARACTERS_MAX
        ):
            # The secret itself is kept out of the message: messages are logged.
            raise ConfigError(
                f"iscsi.chap.{option}: {len(secret)} characters; a secret has"
                f" {CHAP_SECRET_CHARACTERS_MIN} to {CHAP_CHARACTERS_MAX}"
            )
    if section.secret == section.mutual_secret:
        # RFC 7143 9.2.1: the same secret must not be used in both directions, or an answer could be
        # reflected.
        raise ConfigError("iscsi.chap.mutual_secret: the same as secret; give two different ones")
    return Chap(section.user, section.secret, section.mutual_user, section.mutual_secret)


def _explain(message: str, tables: dict[str, Any]) -> str:
    """A sentence from msgspec's ``Expected `int`, got `str` - at `$.iscsi.connections_max```."""
    what, _, where = message.partition(" - at ")
    path = [part for part in re.split(r"[.\[\]]", where.strip("`").removeprefix("$")) if part]
    missing = re.fullmatch(r"Object (?:missing required|contains unknown) field `(.+)`", what)
    if missing is not None:
        option = ".".join([*path, missing[1]])
        if "unknown" in what:
            return f"{option} is not an option; {_options(path)}"
        return f"{option} is missing; {_options(path)}"
    value: Any = tables
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    shown = "..." if path[-1:] and "secret" in path[-1] else repr(value)
    return f"{'.'.join(path) or 'the file'}: {shown} is wrong: {what[0].lower()}{what[1:]}"


def _options(path: list[str]) -> str:
    """What there is at this place of the file."""
    section: type[_Section] = FileLayout
    for part in path:
        section = SECTIONS[section, part]
    place = f"[{'.'.join(path)}]" if path else "the file"
    options = ", ".join(field.encode_name for field in msgspec.structs.fields(section))
    return f"{place} has {options}"


def _sections(
    within: type[_Section],
) -> Iterator[tuple[tuple[type[_Section], str], type[_Section]]]:
    for field in msgspec.structs.fields(within):
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and issubclass(kind, _Section):
                yield (within, field.encode_name), kind
                yield from _sections(kind)


# Each section by the one that holds it and its name there.
SECTIONS: Final = dict(_sections(FileLayout))
