r"""Whether two answers to a maths problem are the same: `await same_answer(gold, answer)`.

Most answers are numbers or words, and those are settled here (`settle`). Everything else is math-verify's to decide: it
reads LaTeX as SymPy expressions, of which a model can write some that never end (`9^9^9^9`). So it works in processes
that are ended, and whose memory is limited; an answer that takes too long is not the gold answer.

What math-verify does not decide as a task needs it is decided before it is asked:

* **percent**: `50\%` is 50 and also 0.5, whichever the other side says; two percentages are compared as such.
* **units** and degrees are left out, unless both sides name units and these differ (5 cm, 5 m); so is what is counted
  (3 books), where the other side does not say it.
* **words** are compared as text, without regard to case (to math-verify, they are products of variables). What is set
  as text is read like the rest: math-verify leaves it out, so that `3 \text{ million}` would be 3.
* **relations** of numbers that differ (8 = 7) are no answer.
* **choices**: `(B)`, `B.`, `\text{B}` and `(B) 12` are B.
* **bases**: 210_5 is not 210_6; without a base, the digits alone are compared.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import resource
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

from pebble import ProcessExpired

from recipe.gtpo.run.processes import Processes

logger = logging.getLogger(__name__)

CPU_SECONDS = 2.0  # of one comparison: a hundred times the usual one
WALL_SECONDS = 4.0  # a power that C code works out does not hear the alarm: its process is killed
MEMORY_BYTES = 2 << 30  # beyond what a process holds after its imports
LONGEST = 2000  # characters of an answer; the longest gold answer of MATH-500 has 53
DEEPEST = 40  # brackets of an answer in one another: the parser's time doubles with some of them
_KEPT = 4096  # verdicts, and in each process parsed answers
_ATTEMPTS = 2  # at a comparison whose process does not live to answer
_DIGITS = 6  # that count where one side is a decimal number, from its first that is not 0


async def same_answer(gold: str, answer: str) -> bool:
    """Whether `answer` states what `gold` states. Never raises for what an answer is.

    Args:
        gold, answer: the content of a `\\boxed{}`, with or without dollar signs.
    """
    verdict = settle(gold, answer)
    if verdict is not None:
        return verdict
    return await _ask_math_verify([pair for pair in _candidates(gold, answer) if _settle_pair(*pair) is None])


async def is_checkable(gold: str) -> bool:
    """Whether an answer that is right can be found right: the gold is compared with itself, as by math-verify where
    the text alone would not settle it."""
    number_or_words = _number(_bare(gold)) is not None or _words(_bare(gold)) is not None
    return number_or_words or await _ask_math_verify([(_bare(gold), _bare(gold))])


def settle(gold: str, answer: str) -> bool | None:
    """The verdict on what needs no algebra: equal texts, numbers, words. None for everything else."""
    if not answer.strip() or len(answer) > LONGEST:
        return False
    if _clean(gold) == _clean(answer):
        return True
    if _other_units(gold, answer) or _contradicts_itself(answer):
        return False
    verdicts = [_settle_pair(*pair) for pair in _candidates(gold, answer)]
    if any(verdicts):
        return True
    return None if None in verdicts and _depth(answer) <= DEEPEST else False


def _depth(text: str) -> int:
    """How deeply brackets are nested, closed or not."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _settle_pair(gold: str, answer: str) -> bool | None:
    if gold == answer:
        return True
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if bases[0] is not None and bases[1] is not None:
        return bases[0].groups() == bases[1].groups()
    if (choice := _choice(answer)) is not None and _GOLD_CHOICE.fullmatch(gold):
        return choice == _choice(gold)
    if (same := _same_number(gold, answer)) is not None:
        return same
    numbers = _number(gold), _number(answer)
    if (numbers[0] is None) != (numbers[1] is None) and _SEVERAL.search(answer if numbers[1] is None else gold):
        return False  # one number, and a list, an interval, a tuple, a matrix
    words = _words(gold), _words(answer)
    if words[0] is not None and words[1] is not None:
        return words[0] == words[1]
    if _PHRASE.fullmatch(gold) and _PHRASE.fullmatch(answer):
        return gold.lower() == answer.lower()
    return None


def _same_number(one: str, other: str) -> bool | None:
    """None where one of them is no number."""
    numbers = _number(one), _number(other)
    if numbers[0] is None or numbers[1] is None:
        return None
    error = abs(numbers[0] - numbers[1])
    whole = numbers[0].denominator == numbers[1].denominator == 1  # 1000001 is not 1000000.0
    if whole or 0 in numbers or "." not in one + other:
        return error == 0
    # The smaller one's digits: 0.999996 is not 1, but 0.9999996 rounds to it.
    return 2 * error <= _last_digit(min(abs(numbers[0]), abs(numbers[1])))


def _last_digit(number: Fraction) -> Fraction:
    """What one more in the last digit that counts adds to a positive number: 1e-5 from 1 on, 1e-6 below."""
    # The power of ten of its first digit, or one more.
    first = len(str(number.numerator)) - len(str(number.denominator))
    if number < Fraction(10) ** first:
        first -= 1
    return Fraction(10) ** (first - _DIGITS + 1)


def _contradicts_itself(answer: str) -> bool:
    """Whether numbers are said to be equal that are not, or about equal where the second is no rounding of the first:
    8 = 7, 11 ≈ 12. Of numbers in different units nothing is known."""
    sides = dict.fromkeys(side.strip() for side in _RELATION.split(_clean(answer)))  # each once
    numbers = [side for side in sides if _number(_bare(side)) is not None]
    about = _ABOUT.search(answer) is not None
    return not all(
        settle(*pair) or _other_units(*pair) or (about and _is_rounding(*pair)) for pair in itertools.pairwise(numbers)
    )


def _is_rounding(exact: str, other: str) -> bool:
    """Whether `other` is a decimal number to which `exact` rounds."""
    numbers, decimal = (_number(_bare(exact)), _number(_bare(other))), _DECIMAL.fullmatch(_bare(other))
    if numbers[0] is None or numbers[1] is None or decimal is None:
        return False
    return 2 * abs(numbers[0] - numbers[1]) * 10 ** len(decimal[1]) <= 1


def _candidates(gold: str, answer: str) -> list[tuple[str, str]]:
    """The pairs of which one has to be equal: several where one side alone is a percentage, or says what it counts."""
    percent = [_is_percentage(text) for text in (gold, answer)]
    counts = _count(gold), _count(answer)
    gold, answer = _bare(gold), _bare(answer)
    pairs = [(gold, answer)]
    if percent == [True, False]:
        pairs.append((_hundredth(gold), answer))
    if percent == [False, True]:
        pairs.append((gold, _hundredth(answer)))
    if counts[0] is not None:
        pairs.append((counts[0], answer))
    if counts[1] is not None:
        pairs.append((gold, counts[1]))
    return pairs


def _hundredth(text: str) -> str:
    number = _number(text)
    return str(number / 100) if number is not None else rf"\frac{{{text}}}{{100}}"


# -- reading ----------------------------------------------------------------------------------------------------------

_SPACES = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad\b|qquad\b)|~")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree\b|\^\s*\{?\s*\\degree\s*\}?|\bdegrees?\b")
_PERCENT = re.compile(r"\s*(\\?%|\bpercent\b)")
_CURRENCY = re.compile(r"^(-?)\s*(?:\\\$|\$|€|£|\\pounds\b)\s*(?=[\d.])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_AS_TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:bf|it|rm|sf)|mbox|operatorname)\s*"
_TEXT = re.compile(rf"{_AS_TEXT}\{{([^{{}}]*)\}}")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3}(?!\d))")
_BRACED_MARK = re.compile(r"(?<=\d)\{([.:,;])\}(?=\d)")  # set without the space that would follow it: 12{:}30
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")  # 12 500
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(/\d+|[eE][-+]?\d{1,2})?")  # 1e-05 is what Python prints
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\s*\\overline\s*\{\s*(\d+)\s*\}")
_MIXED = re.compile(r"(-?)(\d+)(?: (?=\d)| ?(?=\\))(\d{1,2}/\d{1,2}|\\[dt]?frac.*)")  # 1 500/3 may be 1500/3
_BASED = re.compile(r"(\d\w*?)\s*_\s*\{?\s*(\d+)\s*\}?")
_SIMPLE_FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_DECIMAL = re.compile(r"[-+]?\d*\.?(\d*)")
_ABOUT = re.compile(r"\\approx(?:eq)?\b|≈")
_RELATION = re.compile(rf"=|{_ABOUT.pattern}")
_SEVERAL = re.compile(r",|\\cup|\\begin")
_WORD = r"(?=[A-Za-z]*[aeiouAEIOU])[A-Za-z]{3,}"  # with a vowel: xyz is a product
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*")
#: Words and numbers, such as a date.
_PHRASE = re.compile(rf"(?!.*\b(?:and|or)\b)(?=.*\b{_WORD}\b)[A-Za-z\d]+(?: [A-Za-z\d]+)+")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?\.?")
_GOLD_CHOICE = re.compile(r"\(?[A-J]\)?\.?")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])(?:[.):]|$))(?!\s*[+*/^=<>_])\s*(.*)", re.I | re.DOTALL
)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])|\b(?:or|and|not)\b")
#: What is counted begins with a word, or makes an ordinal number.
_COUNTED = rf"({_WORD}(?: [A-Za-z]{{2,}}){{0,3}}|st|nd|rd|th)"
_COUNT = re.compile(rf"([-+]?(?:\d+ (?=\d{{1,2}}/))?[\d.,/]+)(?: |(?=..$)){_COUNTED}")
_COUNT_IN_TEXT = re.compile(rf"(?=.*\d)(.*){_AS_TEXT}\{{\s*{_COUNTED}\.?\s*\}}", re.DOTALL)
_MULTIPLES = (
    "half third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth "
    "ten dozen hundred thousand lakh million crore billion trillion"
).split()
#: Words that say more of a number than what it counts.
_NOT_COUNTED = frozenset(
    "or and not to of over per by plus minus times divided squared cubed root factorial choose mod base point power pi "
    "percent halves degrees if when where unless except sin cos tan log ln sqrt".split()
).union(_MULTIPLES, (f"{word}s" for word in _MULTIPLES))
_SET_OF = re.compile(
    r"(?:\\left\s*)?\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?::|\||\\mid\b)(.*\b\1\b.*?)(?:\\right\s*)?\\\}"
)
_OPEN_ENDS = re.compile(r"([\[\]])([^\[\]()]+,[^\[\]()]+)([\[\]])")

#: One unit a line, in all its spellings.
_UNITS = {
    spelling: line.split()[0]
    for line in """
        mm millimeter millimeters millimetre millimetres
        cm centimeter centimeters centimetre centimetres
        meter meters metre metres
        km kilometer kilometers kilometre kilometres
        inch inches
        foot feet ft
        yard yards yd
        mile miles mi
        mph miles/hour mile/hour
        km/h kph kilometers/hour kilometres/hour
        m/s meters/second metres/second
        gram grams
        kg kilogram kilograms
        pound pounds lb lbs
        ounce ounces oz
        liter liters litre litres
        ml milliliter milliliters
        gallon gallons
        second seconds sec secs
        minute minutes min mins
        hour hours hr hrs
        day days
        week weeks
        month months
        year years
        dollar dollars
        cent cents
        unit units
        square sq
        cubic cu
    """.strip().splitlines()
    for spelling in line.split()
}
#: As a unit's word, and only where it alone is set as text: 5m may be five times m.
_SYMBOLS = {"m": "meters", "s": "seconds", "h": "hours", "g": "grams", "L": "liters", "in": "inches"}
_UNIT = re.compile(
    rf"(?:/ ?)?(?<![A-Za-z\\])({'|'.join(sorted(_UNITS, key=len, reverse=True))})\b\.?(?:\s*\^\s*\{{?\d\}}?)?", re.I
)
_UNITS_AT_END = re.compile(rf"(?:\s+{_UNIT.pattern}){{1,3}}$", re.I)


def _clean(text: str) -> str:
    """Without the marks that only typeset: outer dollar signs and brackets of maths mode, spaces, a full stop."""
    text = " ".join(text.split())  # a thousand spaces cost the patterns seconds
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)]
    text = _BRACED_MARK.sub(r"\1", _SEPARATOR.sub("", text))
    if not any(opener in text for opener in ("(", "[", r"\{")):  # in (100,200) the comma is none of thousands
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _SPACES.sub(" ", text).strip().removeprefix("=").removesuffix("\\\\").rstrip(".").strip()
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\mathrm{e}", "e").replace(r"\mathrm{i}", "i")
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    if (ends := _OPEN_ENDS.fullmatch(text)) is not None:  # ]0,1[ is (0,1)
        return f"{'(' if ends[1] == ']' else '['}{ends[2]}{')' if ends[3] == '[' else ']'}"
    return text


def _bare(text: str) -> str:
    """Also without currency, percent and degree signs, and without units that follow a number."""
    text = _DOLLAR.sub(" ", _CURRENCY.sub(r"\1", _clean(text)))  # one inside would end what math-verify reads
    text = _DEGREES.sub("", _PERCENT.sub("", text)).strip()
    if (members := _SET_OF.fullmatch(text)) is not None:  # {x: x > 2} is x > 2
        text = members[2].strip()
    spoken = _spoken(text)
    if re.search(r"\d", spoken):
        without = _UNIT.sub("\n", spoken).strip()  # nothing moves up to what stood before: 6 ft 1/2 in is not 6 1/2
        if _number(without) is not None:
            return without
        return _UNITS_AT_END.sub("", spoken)
    return spoken


def _spoken(text: str) -> str:
    """With the words of text mode as they are."""
    words = _TEXT.sub(lambda said: f" {_SYMBOLS.get(said[1].strip(' .'), said[1].strip())} ", text)
    words = re.sub(rf"{_AS_TEXT}(?={{)", " ", words)  # of what has braces of its own
    return re.sub(r"\s+per\s+", "/", " ".join(words.split()))


def _count(text: str) -> str | None:
    """The number of `3 books`; where these are set as text, also the expression of `2^{10} \\text{ ways}`."""
    found = _COUNT_IN_TEXT.fullmatch(_clean(text))
    if found is None or _TEXT.search(found[1]):
        found = _COUNT.fullmatch(_bare(text))
    return None if found is None or _NOT_COUNTED & set(found[2].lower().split()) else _bare(found[1])


def _choice(text: str) -> str | None:
    """The letter of `B`, `(B)`, `B. twelve`, `option B`; None where another letter is named, too."""
    found = _CHOSEN.fullmatch(_spoken(text))
    return None if found is None or _OTHER_CHOICE.search(found[3]) else (found[1] or found[2]).upper()


def _is_percentage(text: str) -> bool:
    return _PERCENT.search(_clean(text)) is not None


def _other_units(gold: str, answer: str) -> bool:
    named = [{_UNITS[found[1].lower()] for found in _UNIT.finditer(_spoken(text))} for text in (gold, answer)]
    named = [units - {"unit", "square", "cubic"} for units in named]
    return bool(named[0] and named[1] and named[0] != named[1])


def _number(text: str) -> Fraction | None:
    """An integer, a decimal number, also a repeating one, a fraction of integers, written a/b or `\\frac{a}{b}`, or a
    mixed number, such as 1 1/2."""
    fraction = _SIMPLE_FRACTION.fullmatch(text)
    if fraction is not None:
        sign, *parts = fraction.groups()
        top, bottom = (int(parts[i] or parts[i + 1]) for i in (0, 2))
        return None if bottom == 0 else Fraction(-top if sign else top, bottom)
    if len(text) <= 300 and (mixed := _MIXED.fullmatch(text)) is not None:
        part = _number(mixed[3])
        if part is None or not 0 < part < 1:
            return None
        return -int(mixed[2]) - part if mixed[1] else int(mixed[2]) + part
    if len(text) <= 300 and (repeating := _REPEATING.fullmatch(text)) is not None:
        sign, whole, once, again = repeating.groups()
        places = 10 ** len(once)
        value = Fraction(int(whole + once or "0"), places) + Fraction(int(again), (10 ** len(again) - 1) * places)
        return -value if sign else value
    if len(text) > 300 or not _NUMBER.fullmatch(text):  # `int` refuses more than 4300 digits
        return None
    over, _, under = text.partition("/")
    return None if under and int(under) == 0 else Fraction(over.rstrip(".")) / (int(under) if under else 1)


def _words(text: str) -> str | None:
    """Words, or one letter that names a choice, in lower case."""
    choice = _CHOICE.fullmatch(text)
    if choice is not None:
        return choice[1].lower()
    return " ".join(text.lower().split()) if _WORDS.fullmatch(text) and "\\" not in text else None


_USUAL = (
    r"\frac{3\sqrt{2}}{2}",
    r"2x^2-\frac{1}{3}y+7",
    r"(-\infty,3)\cup[5,\infty)",
    r"\left(3,\frac{\pi}{2}\right)",
    r"\{1,-2,\sqrt[3]{5}\}",
    r"-2\le x\le 7",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"x=\sin 2a+6i",
    r"10^{-3}\log_2 5",
)

# -- math-verify, in a process ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _processes() -> Processes:
    return Processes(_warm_up)


_verdicts: OrderedDict[tuple[tuple[str, str], ...], bool] = OrderedDict()


async def _ask_math_verify(pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether one of the pairs is equal. Rollouts of a problem often agree: each answer is asked about once."""
    asked = tuple(pairs)
    if asked not in _verdicts:
        verdict = await _in_a_process(asked)
        if verdict is None:
            return False
        _verdicts[asked] = verdict
        while len(_verdicts) > _KEPT:
            _verdicts.popitem(last=False)
    return _verdicts[asked]


def forget() -> None:
    """Drop all verdicts, and end the processes: the next answer starts new ones."""
    _verdicts.clear()
    if _processes.cache_info().currsize:
        _processes().end()
        _processes.cache_clear()


async def _in_a_process(pairs: Sequence[tuple[str, str]]) -> bool | None:
    """Whether one of the pairs is equal; None, which is wrong for now and nothing to remember, where a process died."""
    # An answer that its own CPU seconds or its memory end will always end so: a verdict. A process that the clock ends
    # may only have waited on a busy machine, and one that dies may have been the kernel's choice: both are asked again.
    # A second end by the clock is a verdict, too: C code hears no alarm, and would take its seconds in every rollout.
    died = False
    for _ in range(_ATTEMPTS):
        try:
            done, same = await _processes().call(_any_equal, pairs, seconds=WALL_SECONDS)
        except TimeoutError:
            continue
        except ProcessExpired:
            died = True
            continue
        if done:
            return same
        break
    what = "whose process died" if died else "that takes too long to compare"
    logger.warning("an answer %s counts as wrong: %.80r", what, pairs[0][1])
    return None if died else False


def _warm_up() -> None:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that its own alarm is off: ours is on
    for usual in _USUAL:  # the parser is slow at what it has never seen
        math_verify.verify(_parse(usual), _parse("x+1"), timeout_seconds=None)
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))


class _TooLong(BaseException):
    """Not an Exception: math-verify catches those and tries something else."""


def _any_equal(pairs: Sequence[tuple[str, str]]) -> tuple[bool, bool]:
    """Whether it came to an end, and whether one of the pairs is equal."""
    from math_verify import verify

    try:
        with _alarm(CPU_SECONDS):
            return True, any(
                verify(
                    _parse(gold),
                    _parse(answer),
                    float_rounding=_DIGITS,
                    allow_set_relation_comp=True,
                    timeout_seconds=None,
                )
                for gold, answer in pairs
            )
    except (_TooLong, MemoryError, RecursionError):
        return False, False


@functools.lru_cache(maxsize=_KEPT)  # of gold answers above all
def _parse(text: str) -> list[Any]:
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    # its own units are letters, too: to it 12t is 12
    reading = replace(LatexExtractionConfig().normalization_config, units=False)
    # as an expression, and the first match only: a box holds one answer, and no words around it
    config = LatexExtractionConfig(normalization_config=reading)
    return parse(f"${text}$", [config], parsing_timeout=None, fallback_mode="no_fallback")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """After so many seconds of the CPU, however busy the machine: raise _TooLong. In the main thread of a process."""

    def ring(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
