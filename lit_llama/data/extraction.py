"""The bytes of one file -> text: encodings, HTML and PDF, and the little cleaning that every text gets.

Cleaning destroys nothing that a reader would miss. Finding files and rows is `documents`'.
"""

import codecs
import io
import logging
import re
import unicodedata

CONTROL = r"\x00-\x08\x0e-\x1f\x7f-\x9f"
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

# Parts of a page that are not its text. What is in doubt (aside, header) stays: better a menu too many than text lost.
NOT_TEXT = """
    head, script, style, noscript, template, svg, iframe, object, canvas, button, select, textarea, nav, footer,
    .headerlink, [hidden], [aria-hidden=true], [role=navigation], [role=search], [role=contentinfo]
"""
PARAGRAPHS = frozenset("p h1 h2 h3 h4 h5 h6 ul ol dl table pre blockquote section article".split())
LINES = frozenset("div li tr dt dd main header aside figure figcaption caption address fieldset br".split())
# Stand for layout until the text is whole; such control characters in the page itself are dropped.
PARAGRAPH_BREAK, LINE_BREAK, BULLET, VERBATIM = "\x02", "\x03", "\x04", "\x05"


class Unusable(Exception):
    """Says why a file's content gives no text."""


def decode(data: bytes, declared: str | None = None) -> tuple[str, bool]:
    """Text of a file's bytes, and whether it had to be read as Windows-1252 for want of anything better.

    Tried are a byte order mark (UTF-8, UTF-16), UTF-8, the declared encoding, and Windows-1252 where that gives nothing
    but printable characters, most of them ASCII.

    Raises:
        Unusable: binary, or of an encoding that cannot be told.
    """
    marked = [encoding for mark, encoding in BYTE_ORDER_MARKS.items() if data.startswith(mark)]
    for encoding in [*marked, "utf-8", *([declared] if declared else [])]:
        try:
            text = data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
        if "\0" in text:
            raise Unusable("binary (NUL bytes)")
        return text, False
    if b"\0" in data:
        raise Unusable("binary (NUL bytes)")
    text = data.decode("cp1252", errors="ignore")  # shorter than the data where a byte is undefined
    ascii_bytes = sum(byte < 128 for byte in data)
    if len(text) < len(data) or re.search(f"[{CONTROL}]", text) or ascii_bytes < 0.7 * len(data):
        raise Unusable("undecodable (binary, or text in neither UTF-8, UTF-16 nor Windows-1252: convert it to UTF-8)")
    return text, True


def declared_encoding(data: bytes) -> str | None:
    """The encoding that an HTML or XHTML page claims, as browsers read the claim (Latin-1 means Windows-1252)."""
    found = re.search(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", data[:2048])
    if found is None:
        return None
    name = found[1].decode("ascii", errors="replace").lower()
    return "cp1252" if name in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii") else name


def clean(text: str) -> str:
    """NFC, one kind of newline, no control characters, no space at line ends, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", re.sub("[\ud800-\udfff]", "\ufffd", text))
    text = re.sub("\r\n|[\r\x0b\x0c\x85\u2028\u2029]", "\n", text)
    text = re.sub(f"[{CONTROL}\u00ad\ufeff]", "", text)  # soft hyphen and byte order mark are as invisible
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def pdf_text(data: bytes) -> str:
    """Text of all pages of a PDF, in the order of its content streams. Raises Unusable if it needs a password."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports every oddity of every file
    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted:
        try:
            opened = reader.decrypt("")
        except (pypdf.errors.DependencyError, NotImplementedError):
            opened = False
        if not opened:
            raise Unusable("encrypted PDF (save it without the password)")
    return "\n\n".join(page.extract_text() for page in reader.pages)


def html_text(markup: str) -> str:
    """Readable text of a page: its one <main>, or else one <article>, or else <body>, without menus, scripts and forms.

    Blocks become paragraphs or lines, list items begin with "- ", cells are set apart by tabs, <pre> keeps its spaces.
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(markup)
    for node in tree.css(NOT_TEXT):
        node.decompose()
    candidates = (tree.css("main, [role=main]"), tree.css("article"), tree.css("body"))
    root = next((found[0] for found in candidates if len(found) == 1), None)
    pieces = [""]
    stack = [] if root is None else [(root, False)]
    while stack:
        node, preformatted = stack.pop()
        if isinstance(node, str):
            pieces.append(node)
            continue
        tag = node.tag
        if tag == "-text":
            text = re.sub(f"[{CONTROL}]", "", node.text_content or "")
            if not preformatted:
                text = re.sub(r"\s+", " ", text)
                text = text.removeprefix(" ") if pieces[-1].endswith((" ", "\t")) else text
            if text:
                pieces.append(text)
            continue
        if tag in PARAGRAPHS or tag in LINES:
            mark = PARAGRAPH_BREAK if tag in PARAGRAPHS else LINE_BREAK
            pieces.append(mark + (BULLET if tag == "li" else VERBATIM if tag == "pre" else ""))
            stack.append((mark, False))
        elif tag in ("td", "th"):
            stack.append(("\t", False))
        children = [(child, preformatted or tag == "pre") for child in node.iter(include_text=True)]
        stack.extend(reversed(children))
    text = re.sub(f"{BULLET}[ \t{PARAGRAPH_BREAK}{LINE_BREAK}]*", "- ", "".join(pieces))
    breaks = f"[ \t]*[{PARAGRAPH_BREAK}{LINE_BREAK}][ \t{PARAGRAPH_BREAK}{LINE_BREAK}]*"
    text = re.sub(breaks, lambda found: "\n\n" if PARAGRAPH_BREAK in found[0] else "\n", text)
    return text.replace(VERBATIM, "")
