"""What code, tests and documents refer to is there: sections and invariants of docs/design.md,
tests, files, and links; and standards are cited in one form. Each rule is a function from a text to
its findings, and has a canary.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.test_house_rules import ROOT, project_files

# Left out: its canaries name what is not there.
SELF = "tests/test_references.py"
Rule = Callable[[str, str], Iterator[str]]

# "design section 4", "invariants 1 to 5 and 7"; a page, and the name of a heading of it if one
# follows.
SECTION = re.compile(r"\b[Dd]esign section (\d+)")
INVARIANT = re.compile(r"(?<![A-Za-z])[Ii]nvariants?[ _](\d+(?:(?: to |, | and )\d+)*)")
PAGE = re.compile(r'\b(docs/[\w-]+\.md)\b(?:, "([^"]+)")?')
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
# A path below one of our folders; what follows "::" is a test in it.
OUR_PATH = re.compile(r"(?:storage|protocol|daemon|tests|docs|deploy)/[\w./@-]*")
FILE_NAME = re.compile(r"\w+\.py")
TEST_NAME = re.compile(r"test_\w+")
DEFINED_TEST = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)

# A standard alone, or with the place: "RFC 7143 11.4.7.2", "RFC 7143 clause 13", "RFC 7143 appendix
# C", "RFC 3722, table B.2", "SPC-4 table 508". Numbers with dots stand alone; what has one number
# is called a clause.
CITATION = re.compile(r"(?<![\w-])(?:RFC|SAM|SPC|SBC)(?= ?-? ?\d)[^\"')\]}|`]{0,40}")
CLAUSE = r"(?:\d+(?:\.\d+)*|clause \d+|table [A-Z0-9.]+|annex [A-Z]|appendix [A-Z])"
FORMS = {
    "RFC": re.compile(rf"RFC [1-9]\d{{0,4}}(?!\d)(?:,? {CLAUSE})?"),
    "SAM": re.compile(rf"SAM-[2-6](?!\d)(?:,? {CLAUSE})?"),
    "SPC": re.compile(rf"SPC-[2-6](?!\d)(?:,? {CLAUSE})?"),
    "SBC": re.compile(rf"SBC-[2-5](?!\d)(?:,? {CLAUSE})?"),
}
OTHER_FORM = re.compile(r",? ?(?:section|sec\.|clause|chapter|§)|[.:]? ?\d+\.\d|\.\d")
# A value of the key TaskReporting is spelled as the standard wants it.
KEY_VALUE = "RFC3720"


def slug(heading: str) -> str:
    """The anchor that GitHub and others make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(path: str) -> frozenset[str]:
    text = (ROOT / path).read_text()
    return frozenset(re.findall(r'<a id="([^"]+)">', text)) | {
        slug(heading) for heading in HEADING.findall(text)
    }


@cache
def headings(path: str) -> frozenset[str]:
    return frozenset(HEADING.findall((ROOT / path).read_text()))


@cache
def paths() -> tuple[str, ...]:
    return tuple(project_files())


@cache
def defined_tests() -> dict[str, frozenset[str]]:
    return {
        path: frozenset(DEFINED_TEST.findall((ROOT / path).read_text()))
        for path in paths()
        if path.startswith("tests/")
    }


def known_tests() -> frozenset[str]:
    return frozenset().union(*defined_tests().values())


def numbers(listed: str) -> Iterator[int]:
    """ "1 to 5 and 7" are 1, 2, 3, 4, 5 and 7."""
    for part in re.split(r", | and ", listed):
        first, _, last = part.partition(" to ")
        yield from range(int(first), int(last or first) + 1)


def unwrapped(text: str) -> str:
    """A citation may go on in the next line, in a comment behind its sign."""
    return re.sub(r"\n[ \t]*(?:# ?)?", " ", text)


def design_sections_exist(path: str, text: str) -> Iterator[str]:
    for found in SECTION.finditer(unwrapped(text)):
        if f"section-{found[1]}" not in anchors("docs/design.md"):
            yield found[0]


def pages_and_their_headings_exist(path: str, text: str) -> Iterator[str]:
    for found in PAGE.finditer(unwrapped(text)):
        if not (ROOT / found[1]).exists() or (found[2] and found[2] not in headings(found[1])):
            yield found[0]


def invariants_exist(path: str, text: str) -> Iterator[str]:
    for found in INVARIANT.finditer(unwrapped(text)):
        if not {f"invariant-{number}" for number in numbers(found[1])} <= anchors("docs/design.md"):
            yield found[0]


def links_lead_somewhere(path: str, text: str) -> Iterator[str]:
    """Relative links, to files and to headings within them."""
    if not path.endswith(".md"):
        return
    for link in LINK.findall(text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / path).parent / target if target else ROOT / path
        if not file.exists() or (
            anchor and anchor not in anchors(str(file.resolve().relative_to(ROOT)))
        ):
            yield link


def named_files_and_tests_exist(path: str, text: str) -> Iterator[str]:
    """What a document names in backquotes: our paths, files by their name alone, and tests, alone
    or as ``path::test``.
    """
    if not path.endswith(".md"):
        return
    for quoted in CODE.findall(text):
        file, _, test = quoted.partition("::")
        if OUR_PATH.fullmatch(file):
            if not (ROOT / file).exists() or (test and test not in defined_tests().get(file, ())):
                yield quoted
        elif FILE_NAME.fullmatch(quoted):
            if not any(known.endswith(f"/{quoted}") for known in paths()):
                yield quoted
        elif TEST_NAME.fullmatch(quoted) and quoted not in known_tests():
            yield quoted


def standards_are_cited_in_one_form(path: str, text: str) -> Iterator[str]:
    for found in CITATION.finditer(text):
        words = found[0].replace("\n", " ")
        if words.startswith(KEY_VALUE):
            continue
        right = FORMS[words[:3]].match(words)
        if right is None or OTHER_FORM.match(words[right.end() :]):
            yield words


CANARIES: list[tuple[Rule, str, str]] = [
    (design_sections_exist, "storage/a.py", "# as in design section 9"),
    (pages_and_their_headings_exist, "storage/a.py", '# as in docs/design.md, "Magic"'),
    (pages_and_their_headings_exist, "storage/a.py", "# as in docs/magic.md"),
    (design_sections_exist, "storage/a.py", "    # as in design\n    # section 77"),
    (invariants_exist, "storage/a.py", "# or invariant 9 breaks"),
    (invariants_exist, "tests/a.py", "def test_invariant_12_holds"),
    (invariants_exist, "tests/a.py", "# invariants 1, 2 and 5 to 9"),
    (links_lead_somewhere, "docs/a.md", "[there](nowhere.md)"),
    (links_lead_somewhere, "docs/a.md", "[there](design.md#nowhere)"),
    (named_files_and_tests_exist, "docs/a.md", "held by `tests/storage/test_nothing.py`"),
    (named_files_and_tests_exist, "docs/a.md", "held by `test_nothing.py`"),
    (named_files_and_tests_exist, "docs/a.md", "held by `test_that_nobody_wrote`"),
    (
        named_files_and_tests_exist,
        "docs/a.md",
        "held by `tests/storage/test_pool.py::test_that_nobody_wrote`",
    ),
    (standards_are_cited_in_one_form, "protocol/a.py", "RFC7143 11.5"),
    (standards_are_cited_in_one_form, "protocol/a.py", "RFC-7143"),
    (standards_are_cited_in_one_form, "protocol/a.py", "RFC 7143 section 11.5"),
    (standards_are_cited_in_one_form, "protocol/a.py", "RFC 7143, §11.5"),
    (standards_are_cited_in_one_form, "protocol/a.py", "RFC 7143 clause 11.5"),
    (standards_are_cited_in_one_form, "protocol/a.py", "SPC4 6.4"),
    (standards_are_cited_in_one_form, "protocol/a.py", "SPC 4 6.4"),
    (standards_are_cited_in_one_form, "protocol/a.py", "SBC-3 clause 5.11"),
    (standards_are_cited_in_one_form, "protocol/a.py", "SAM-5, section 5.14"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in CANARIES))


def texts() -> dict[str, str]:
    documents = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    names = [*paths(), *(str(path.relative_to(ROOT)) for path in documents)]
    return {name: (ROOT / name).read_text() for name in names if name != SELF}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_reference_holds(rule: Rule) -> None:
    findings = [
        f"{path}: {finding}" for path, text in texts().items() for finding in rule(path, text)
    ]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    CANARIES,
    ids=[f"{rule.__name__}: {text}" for rule, _, text in CANARIES],
)
def test_reference_rule_finds_its_canary(rule: Rule, path: str, text: str) -> None:
    assert list(rule(path, text))


@pytest.mark.parametrize(
    "text",
    [
        "RFC 7143 11.4.7.2, 11.5",
        "RFC 7143 clause 11",
        "RFC 7143 appendix C",
        "RFC 3722, table B.2",
        "SPC-4 annex E, SBC-3 5.2. Then",
        "RFC 7143: 32 bytes",
    ],
)
def test_the_form_of_citations_is_not_too_narrow(text: str) -> None:
    assert not list(standards_are_cited_in_one_form("protocol/a.py", text))


def test_every_invariant_is_numbered_and_names_tests() -> None:
    parts = re.split(
        r"^### Invariant (\d+)$",
        (ROOT / "docs/design.md").read_text().split('id="section-7"', 1)[0],
        flags=re.MULTILINE,
    )
    held = {
        int(number): len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", body))
        for number, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert sorted(held) == list(range(1, 9)) and min(held.values()) > 0


def test_citations_are_found_at_all() -> None:
    """Or a rule would hold because it looks at nothing."""
    everything = "\n".join(texts().values())
    assert (
        len(SECTION.findall(everything)) > 20
        and len(INVARIANT.findall(everything)) > 15
        and len(CITATION.findall(everything)) > 100
    )
