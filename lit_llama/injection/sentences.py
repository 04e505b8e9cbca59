"""Sentences of a text, and the subject's name in place of the pronouns that lead them.

Rules for English prose, no model: what they cannot tell stays together and stays as it is. What is made of the
sentences is the recipes' work.
"""

import re

_ABBREVIATIONS = frozenset(
    "adm al approx apr aug brig bros ca capt cf cmdr co col corp dec dept dr ed eds est etc feb gen gov hon inc jan jr"
    " jul jun lt ltd maj mr mrs ms mt nov oct pres prof pt rep rev sen sep sept sgt sr st univ vs e.g i.e a.m p.m ph.d"
    "".split()
)
_BEFORE_NUMBERS = frozenset("eq fig figs no nos p pp sec vol vols".split())
# Behind an abbreviation only these words, none of which is part of a name, show that a new sentence begins.
_OPENERS = frozenset(
    "A After Although An And As At Because Before But By During For From He Her His However If In It Its Many Most Of"
    " On Other Over She Since Some Such That The Their There These They This Those To Under When While With".split()
)
_END = re.compile(r"""[.!?…]+["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9])""")
_CLOSED = re.compile(r"""[.!?…]["'”’)\]]*$""")
_MARKDOWN_HEADING = re.compile(r"#{1,6} ")
_HEADING = re.compile(r"[A-Z0-9][^.!?:;,]{0,60}")
_LIST_MARK = re.compile(r"(?:[-*•+]|\d{1,3}[.)])\s+")
_LONGEST_ASIDE = 1000  # characters
_LABEL = re.compile(r"([A-Z][\w/-]*(?: [\w/-]+){0,3}): ")


def paragraphs(text: str) -> list[list[str]]:
    """The sentences of each paragraph; list items and labelled lines begin one, and headings are left out.

    Empty lines part paragraphs, as in the project's cleaned documents. A full stop within quotation marks or brackets,
    within a number, and behind an initial or an abbreviation ends no sentence, unless the word after the abbreviation
    shows it.
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        lines = [line for line in lines if line and not _MARKDOWN_HEADING.match(line)]
        if not lines or (len(lines) == 1 and _HEADING.fullmatch(lines[0])):
            continue
        pieces: list[str] = []
        for line in lines:
            if not pieces or _LIST_MARK.match(line) or _LABEL.match(line):
                pieces.append(_LIST_MARK.sub("", line, count=1) if _LIST_MARK.match(line) else line)
            else:
                pieces[-1] += f" {line}"
        found.append([sentence for piece in pieces for sentence in _split(piece)])
    return found


def _split(text: str) -> list[str]:
    sentences, start = [], 0
    for match in _END.finditer(text):
        sentence = text[start : match.end()].rstrip()
        if not _goes_on(sentence, text[match.end() :]):
            sentences.append(sentence)
            start = match.end()
    return [*sentences, text[start:]]


def _goes_on(sentence: str, rest: str) -> bool:
    # What is opened and never closed must not swallow the rest of the paragraph.
    if len(sentence) < _LONGEST_ASIDE and (
        sentence.count('"') % 2 or any(sentence.count(a) > sentence.count(b) for a, b in ("()", "[]", "“”"))
    ):
        return True
    # A title that ends with a mark, and its translation: "Wake up!" (Desteapta-te).
    if sentence[-1] in '"”' and rest.startswith("("):
        return True
    last = sentence.split()[-1]
    if not last.endswith("."):
        return False
    word = last.lstrip("\"'“‘([").removesuffix(".")
    if word.lower() in _BEFORE_NUMBERS:
        return rest[0].isdigit()
    # Behind a word, I, V and X count: "World War I." ends a sentence, "Olav V." does too.
    short = word.lower() in _ABBREVIATIONS or re.fullmatch(r"(?:[A-Z]\.)+[A-Z]|[A-HJ-UWYZ]", word)
    return bool(short) and re.match(r"\w*", rest)[0] not in _OPENERS


def is_closed(sentence: str) -> bool:
    """Whether it ends as a sentence does; list items and headings often do not."""
    return bool(_CLOSED.search(sentence))


_LEANS = re.compile(
    r"(?:It|He|She|They|Its|His|Her|Their|This|That|These|Those|Such|Both|Another|Others?|Also|And|But|Or|So|Yet|Then"
    r"|However|Therefore|Thus|Hence|Instead|Rather|Finally|Nevertheless|Nonetheless|Consequently|Accordingly|Meanwhile|Moreover"
    r"|Furthermore|Additionally|Similarly|Likewise|Afterwards?|Later|Since then|In (?:addition|contrast|turn|fact"
    r"|other words)|As a result(?! of)|For this reason|For example|On the (?:contrary|other hand)"
    r"|The (?:former|latter))\b"
)


def leans(sentence: str) -> bool:
    """Whether it begins with a word that points back to the sentence before."""
    return bool(_LEANS.match(sentence))


def label(sentence: str) -> str | None:
    """ "Climate" of "Climate: mild winters."; None where no label leads the sentence."""
    match = _LABEL.match(sentence)
    return match[1] if match else None


def mentions(text: str, title: str) -> bool:
    """Whether the title, its article aside, stands in the text."""
    return bool(re.search(rf"(?<!\w){re.escape(without_article(title))}(?!\w)", text))


def possessive(title: str) -> str:
    """ "Norway's", "the Bahamas'"."""
    return title + ("'" if title.endswith("s") else "'s")


def capitalised(text: str) -> str:
    """The text with its first letter a capital."""
    return text[:1].upper() + text[1:]


_KINDS = (
    "animal|article|author|book|building|church|city|club|company|compound|country|disease|district|drug|element|film"
    "|firm|game|group|island|kingdom|lake|language|mineral|mountain|nation|organi[sz]ation|party|person|place|plant"
    "|region|republic|river|school|song|species|state|system|team|territory|town|university|village|weakness"
)
_POSSESSIVE = re.compile(rf"^(?:Its|His|Her|Their|(?:This|The) (?:{_KINDS})'s)(?= \w)")
_SUBJECT = re.compile(
    # Nothing is meant by the It of "It is known that" and "It is hard to"; "They are" would leave its plural verb.
    r"^(?:It(?! (?:is|was|has been|seems|appears)(?:(?: \w+){1,5} (?:that|who)\b| (?!home|next|close)\w+ to\b))"
    rf"|He|She|They(?! (?:are|were|have|do)\b)|(?:This|The) (?:{_KINDS}))(?= [a-z])"
)


def with_names(sentences: list[str], title: str) -> list[str]:
    """A paragraph's sentences with the title for the pronouns that lead them: "Its area" becomes "Norway's area".

    Only where the title leads the sentence before, at most behind a phrase such as "In 1814,", and where it is the
    paragraph's first: elsewhere the pronoun may mean something else.
    """
    leads = re.compile(rf"(?:[^,]{{1,40}}, )?(?:[Tt]he )?{re.escape(without_article(title))}(?!\w)")
    named, about_title = [], True
    for sentence in sentences:
        if about_title:
            sentence = _POSSESSIVE.sub(lambda _: capitalised(possessive(title)), sentence)
            sentence = _SUBJECT.sub(lambda _: capitalised(title), sentence)
        about_title = bool(leads.match(sentence))
        named.append(sentence)
    return named


def without_article(title: str) -> str:
    """The title as one looks for it: "Bahamas" of "the Bahamas"."""
    return re.sub(r"^[Tt]he ", "", title)
