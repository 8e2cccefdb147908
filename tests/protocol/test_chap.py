"""CHAP: responses against independent computation, encodings, and every way an exchange
can fail.
"""

import hashlib

import pytest

from protocol.iscsi import chap
from protocol.iscsi.chap import Challenges, ChapSecrets, InitiatorExchange, TargetExchange
from protocol.iscsi.errors import AuthenticationFailed
from protocol.iscsi.limits import CHALLENGES_REMEMBERED

ONE_WAY = ChapSecrets("user", b"secret-of-12+")
MUTUAL = ChapSecrets("user", b"secret-of-12+", "target", b"another-secret")


@pytest.mark.parametrize(
    ("algorithm", "name"), [("5", "md5"), ("6", "sha1"), ("7", "sha256"), ("8", "sha3_256")]
)
def test_responses_are_the_digest_of_identifier_secret_and_challenge(algorithm, name):
    expected = hashlib.new(name, b"\x17" + b"secret" + b"challenge").digest()
    assert chap.response(algorithm, 0x17, b"secret", b"challenge") == expected


@pytest.mark.parametrize(
    ("algorithm", "digest"),  # printf '\\x01secretabcdefgh' | md5sum, sha1sum, sha256sum
    [
        ("5", "c0c5c014138efe20cc2e4489045a1532"),
        ("6", "f65b6e79ed78b9c255215916d7392a5f39e86d81"),
        ("7", "1b8d21011979a6673925009daf8993f4e5d85eee147cc2a20344ca36af90068f"),
    ],
)
def test_vectors_of_other_tools(algorithm, digest):
    assert chap.response(algorithm, 1, b"secret", b"abcdefgh").hex() == digest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x00ff", b"\x00\xff"),
        ("0XAB", b"\xab"),
        ("0xfff", b"\x0f\xff"),
        ("0bAP8=", b"\x00\xff"),
        ("0BAQ==", b"\x01"),
    ],
)
def test_binary_values_come_in_hexadecimal_and_base64(text, value):
    assert chap.decode_binary(text) == value


@pytest.mark.parametrize(
    "text", ["", "0x", "0xzz", "0b***", "12", "0b=", "plain", "0x 12", "0b\u0100"]
)
def test_other_binary_values_are_refused(text):
    with pytest.raises(AuthenticationFailed):
        chap.decode_binary(text)


@pytest.mark.parametrize(
    ("offered", "chosen"), [("5", "5"), ("7,5", "7"), ("99,6,5", "6"), ("8,7,6,5", "8")]
)
def test_the_first_supported_algorithm_of_the_initiators_list_is_chosen(offered, chosen):
    assert chap.choose_algorithm(offered) == chosen


def test_no_supported_algorithm():
    with pytest.raises(AuthenticationFailed):
        chap.choose_algorithm("1,2,three")


def exchange(target_secrets, initiator_secrets):
    """Run both sides to the end; returns whether each is done."""
    target, initiator = (
        TargetExchange(target_secrets, Challenges()),
        InitiatorExchange(initiator_secrets),
    )
    reply: list[tuple[str, str]] = []
    for _ in range(3):
        request = initiator.step(dict(reply))
        reply = target.step(dict(request))
    return target.done, initiator.done


def test_one_way():
    assert exchange(ONE_WAY, ONE_WAY) == (True, True)


def test_mutual():
    assert exchange(MUTUAL, MUTUAL) == (True, True)


@pytest.mark.parametrize(
    "given", [ChapSecrets("user", b"wrong-secret!"), ChapSecrets("other", b"secret-of-12+")]
)
def test_a_wrong_secret_or_user_fails(given):
    with pytest.raises(AuthenticationFailed):
        exchange(ONE_WAY, given)


@pytest.mark.parametrize(("user", "secret"), [("target", b"x"), ("t", b"another-secret")])
def test_a_target_that_cannot_prove_itself_fails(user, secret):
    with pytest.raises(AuthenticationFailed):
        exchange(MUTUAL, ChapSecrets(ONE_WAY.user, ONE_WAY.secret, user, secret))


def test_mutual_is_refused_where_the_target_has_no_secret_of_its_own():
    with pytest.raises(AuthenticationFailed):
        exchange(ONE_WAY, MUTUAL)


def test_equal_secrets_in_both_directions_are_refused():
    same = ChapSecrets("user", b"secret-of-12+", "target", b"secret-of-12+")
    with pytest.raises(AuthenticationFailed):
        exchange(same, same)


def proved(target: TargetExchange, secrets: ChapSecrets) -> dict[str, str]:
    """CHAP_N and CHAP_R that answer the challenge of ``target``."""
    asked = dict(target.step({"CHAP_A": "5"}))
    digest = chap.response(
        "5", int(asked["CHAP_I"]), secrets.secret, chap.decode_binary(asked["CHAP_C"])
    )
    return {
        "CHAP_N": secrets.user,
        "CHAP_R": chap.encode_binary(digest),
        "challenge": asked["CHAP_C"],
    }


def test_a_challenge_of_ours_is_not_answered_on_any_connection():
    challenges = Challenges()
    first, second = TargetExchange(MUTUAL, challenges), TargetExchange(MUTUAL, challenges)
    reflected = dict(first.step({"CHAP_A": "5"}))["CHAP_C"]
    answer = proved(second, MUTUAL)
    del answer["challenge"]
    with pytest.raises(AuthenticationFailed, match="our own"):
        second.step({**answer, "CHAP_I": "1", "CHAP_C": reflected})


def test_an_own_challenge_is_refused_within_one_exchange():
    target = TargetExchange(MUTUAL, Challenges())
    answer = proved(target, MUTUAL)
    challenge = answer.pop("challenge")
    with pytest.raises(AuthenticationFailed, match="our own"):
        target.step({**answer, "CHAP_I": "1", "CHAP_C": challenge})


@pytest.mark.parametrize("identifier", ["256", "x", "-1", "", "0x100"])
def test_a_wrong_identifier(identifier):
    target = TargetExchange(MUTUAL, Challenges())
    answer = proved(target, MUTUAL)
    del answer["challenge"]
    with pytest.raises(AuthenticationFailed):
        target.step({**answer, "CHAP_I": identifier, "CHAP_C": "0x0102"})


def test_a_challenge_that_is_too_long():
    target = TargetExchange(MUTUAL, Challenges())
    answer = proved(target, MUTUAL)
    del answer["challenge"]
    with pytest.raises(AuthenticationFailed, match="length"):
        target.step({**answer, "CHAP_I": "1", "CHAP_C": "0x" + "00" * 1025})


@pytest.mark.parametrize(
    "keys", [{"CHAP_N": "user"}, {"CHAP_A": "5", "CHAP_N": "user"}, {"CHAP_I": "1"}]
)
def test_the_exchange_begins_with_the_algorithm_alone(keys):
    with pytest.raises(AuthenticationFailed):
        TargetExchange(ONE_WAY, Challenges()).step(keys)


def test_challenges_are_forgotten_when_many_have_followed():
    challenges = Challenges()
    first = challenges.new()
    for _ in range(CHALLENGES_REMEMBERED):
        challenges.new()
    challenges.refuse_own(first)  # long past: no exchange of it can still be open


def test_secrets_do_not_show():
    assert b"secret-of-12+".decode() not in repr(MUTUAL)
