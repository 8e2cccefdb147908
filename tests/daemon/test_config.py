"""The configuration: defaults, every option, and a sentence for every mistake."""

import tomllib
from pathlib import Path

import pytest

from daemon import CONTROL_PATH_DEFAULT
from daemon.process.addresses import Address, parse_address
from daemon.process.config import Chap, ConfigError, build, load_file

ROOT = Path(__file__).resolve().parent.parent.parent


def test_defaults() -> None:
    config = build({"pool": {"path": "/p"}})
    assert config.iscsi_listen == (Address("127.0.0.1", 3260),)
    assert config.cache_bytes == 256 << 20
    assert config.pool_size_bytes is None
    assert config.chap is None
    assert config.open_access
    assert config.physical_block_bytes == 4096
    assert (config.log_level, config.log_format) == ("info", "auto")


def test_the_sample_configuration_is_right_and_names_every_option() -> None:
    text = (ROOT / "deploy" / "cleaved.toml").read_text()
    config = build(tomllib.loads(text))
    assert config.pool_path == "/var/lib/cleaved/pool"
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") and "=" in line else line
        for line in text.splitlines()
    )
    every_option = build(tomllib.loads(uncommented.replace("# [", "[")))
    assert every_option.control_path == CONTROL_PATH_DEFAULT
    assert every_option.chap is not None
    assert every_option.chap.mutual_user is not None


def test_every_option() -> None:
    text = """
        [pool]
        path = "/p"
        size = "1GiB"
        cache = "64MiB"
        soft_threshold_percent = 70
        [iscsi]
        listen = ["[::1]:0", "host:3261", "[fe80::1%br-lan.7]:3260"]
        advertise = ["203.0.113.5:3260", "[2001:db8::5]:3260", "san.example.com:3261"]
        connections_max = 3
        open_access = false
        physical_block_bytes = 512
        [iscsi.chap]
        user = "u"
        secret = "secretsecret"
        mutual_user = "m"
        mutual_secret = "othersecret1"
        [control]
        path = "/c"
        [log]
        level = "debug"
        format = "json"
    """
    config = build(tomllib.loads(text))
    assert config.pool_size_bytes == 1 << 30
    assert config.cache_bytes == 64 << 20
    assert config.soft_threshold_percent == 70
    assert config.iscsi_listen == (
        Address("::1", 0),
        Address("host", 3261),
        Address("fe80::1%br-lan.7", 3260),
    )
    assert config.iscsi_advertise == (
        Address("203.0.113.5", 3260),
        Address("2001:db8::5", 3260),
        Address("san.example.com", 3261),
    )
    assert str(config.iscsi_listen[0]) == "[::1]:0"
    assert config.connections_max == 3
    assert config.physical_block_bytes == 512
    assert not config.open_access
    assert config.chap == Chap("u", "secretsecret", "m", "othersecret1")
    assert (config.control_path, config.log_level, config.log_format) == ("/c", "debug", "json")


POOL = 'pool.path = "/p"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["pool is missing", "the file has pool, iscsi"]),
        ("pool = {}", ["pool.path is missing", "[pool] has path, size, cache"]),
        ('pool.path = ""', ["pool.path", "''", "path of a file"]),
        (POOL + 'pool.size = "10GB"', ["pool.size", "'10GB'", "10GiB"]),
        (POOL + 'pool.size = "4KiB"', ["pool.size", "'4KiB'", "8MiB"]),
        (POOL + 'pool.cache = "1KiB"', ["pool.cache", "'1KiB'", "8MiB"]),
        (
            POOL + "pool.soft_threshold_percent = 101",
            ["pool.soft_threshold_percent", "101", "<= 100"],
        ),
        (POOL + "pool.color = 1", ["pool.color is not an option", "path, size, cache"]),
        (POOL + "ftp = {}", ["ftp is not an option"]),
        (POOL + 'nbd.listen = ["here"]', ["nbd.listen", "'here'", "HOST:PORT"]),
        (POOL + 'nbd.listen = ["/a", "/a"]', ["nbd.listen", "/a", "twice"]),
        (POOL + f'nbd.listen = ["/{"a" * 107}"]', ["nbd.listen", "too long", "107"]),
        (POOL + 'nbd.listen = ["0.0.0.0:10809"]', ["nbd.listen", "iscsi.open_access"]),
        (POOL + 'iscsi.listen = "127.0.0.1:1"', ["iscsi.listen", "'127.0.0.1:1'", "array"]),
        (POOL + 'iscsi.listen = ["127.0.0.1"]', ["iscsi.listen", "'127.0.0.1'", "127.0.0.1:3260"]),
        (POOL + "iscsi.listen = []", ["iscsi.listen", "127.0.0.1:3260"]),
        (
            POOL + 'iscsi.listen = ["127.0.0.1:1", "[::1]:1", "127.0.0.1:1"]',
            ["iscsi.listen", "127.0.0.1:1", "twice"],
        ),
        (POOL + "iscsi.listen = [5]", ["iscsi.listen.0", "5", "`str`"]),
        (
            POOL + "iscsi.physical_block_bytes = 1024",
            ["iscsi.physical_block_bytes", "1024", "invalid"],
        ),
        (
            POOL + 'iscsi.listen = ["[fe80::1]:3260"]',
            ["iscsi.listen", "needs its interface", "[fe80::1%eth0]:3260"],
        ),
        (POOL + 'iscsi.listen = ["[fe80::x]:3260"]', ["iscsi.listen", "HOST:PORT"]),
        (
            POOL + 'iscsi.advertise = ["0.0.0.0:3260"]',
            ["iscsi.advertise", "0.0.0.0:3260", "nothing to connect to"],
        ),
        (
            POOL + 'iscsi.advertise = ["host:0"]',
            ["iscsi.advertise", "host:0", "nothing to connect to"],
        ),
        (
            POOL + 'iscsi.advertise = ["[fe80::1%eth0]:3260"]',
            ["iscsi.advertise", "eth0", "nothing to connect to"],
        ),
        (POOL + 'iscsi.advertise = ["host:1", "host:1"]', ["iscsi.advertise", "host:1", "twice"]),
        (POOL + "iscsi.connections_max = 0", ["iscsi.connections_max", "0", ">= 1"]),
        (POOL + 'iscsi.chap = {user = "u"}', ["iscsi.chap.secret is missing"]),
        (POOL + 'iscsi.chap = {user = "", secret = "123456789012"}', ["iscsi.chap.user"]),
        (
            POOL + 'iscsi.chap = {user = "u", secret = "short"}',
            ["iscsi.chap.secret", "5 characters", "12"],
        ),
        (
            POOL + 'iscsi.chap = {user = "u", secret = "123456789012", mutual_user = "m"}',
            ["mutual_secret", "both"],
        ),
        (
            POOL
            + 'iscsi.chap = {user = "u", secret = "123456789012", mutual_user = "m", mutual_secret'
            ' = "123456789012"}',
            ["different"],
        ),
        (POOL + 'iscsi.open_access = "yes"', ["iscsi.open_access", "'yes'", "`bool"]),
        (
            POOL + 'iscsi.listen = ["127.0.0.1:1", "10.0.0.1:3260"]',
            ["10.0.0.1:3260", "open_access", "false", "acl add", "true"],
        ),
        (POOL + 'control.path = "' + "x" * 108 + '"', ["control.path", "107"]),
        (POOL + 'log.level = "loud"', ["log.level", "'loud'"]),
    ],
)
def test_every_mistake_names_the_option_the_value_and_what_would_be_right(
    text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tomllib.loads(text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_access_is_open_by_default_on_loopback(host: str) -> None:
    assert build({"pool": {"path": "/p"}, "iscsi": {"listen": [f"{host}:0"]}}).open_access


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "[::]",
        "10.0.0.1",
        "[fe80::1%eth0]",
        "storage.example",
        "localhost.example",
        "127.0.0.1.example",
    ],
)
def test_elsewhere_somebody_must_say_whether_it_is_open(host: str) -> None:
    iscsi = {"listen": ["127.0.0.1:0", f"{host}:0"]}
    with pytest.raises(ConfigError, match="open_access"):
        build({"pool": {"path": "/p"}, "iscsi": iscsi})
    for said in (True, False):
        assert (
            build({"pool": {"path": "/p"}, "iscsi": {**iscsi, "open_access": said}}).open_access
            is said
        )


@pytest.mark.parametrize("secret", ["", "hunter2"])
def test_a_wrong_secret_is_not_repeated(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"pool": {"path": "/p"}, "iscsi": {"chap": {"user": "u", "secret": secret}}})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build({"pool": {"path": "/p"}, "iscsi": {"chap": {"user": "u", "secret": [secret, 555]}}})
    assert "555" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:99999", "::1:3260", "[::1]", "a b:1", "host:1\n", "host:-1"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:3260"):
        parse_address(text)


def test_a_file_that_cannot_be_read_or_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_file(str(tmp_path / "none"))
    (tmp_path / "bad").write_text("pool = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_file(str(tmp_path / "bad"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_file(str(tmp_path / "binary"))
