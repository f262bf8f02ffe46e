r"""Answers that are the same, answers that are not, and answers that never end."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from decimal import Context, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.tasks import equality
from recipe.gtpo.tasks.equality import is_checkable, same_answer, settle

pytestmark = pytest.mark.unit

SAME = [  # gold, answer
    ("42", "42."),
    ("43", "43.0"),
    ("0.1", ".10"),
    ("18", r"\$18"),
    ("18", "$18$"),
    ("18", "$18"),
    ("-5", "-\\$5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{2}{4}"),
    (r"\frac{1}{3}", "0.3333333"),
    # six digits count, whatever the first of them is
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{1}{7}", "0.142857"),
    (r"\frac{2}{3}", "0.666667"),
    (r"\frac{10}{9}", "1.11111"),
    (r"\frac{1}{300}", "0.00333333"),
    (r"-\frac{1}{3}", "-0.333333"),
    ("0.333333", r"\frac{1}{3}"),
    (r"\frac{9999996}{10000000}", "1.00000"),
    # thousands separators
    ("1000", "1,000"),
    (r"11{,}111{,}100", "11111100"),
    ("12500", r"12,\!500"),
    ("1234567.5", "1,234,567.5"),
    ("1000", r"1\,000"),
    ("12500.5", "12 500.5"),
    ("27,54,108,135", "27, 54, 108, 135"),  # a list
    # other ways to write a number
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"\frac{19}{30}", r"0.6\overline{3}"),
    ("0.00001", "1e-05"),
    ("5", "= 5"),
    ("3/2", "1 1/2"),
    ("-1.5", "-1 1/2"),
    (r"1\frac{1}{2}", "3/2"),
    (r"\frac{11}{4}", r"2 3/4 \text{ cups}"),
    ("12:30", "12{:}30"),
    ("1.5", "1{.}5"),
    (r"\frac{10}{3}", r"\frac{10}{3} \approx 3.33"),
    ("0.5", r"\frac12 = 0.5"),
    (r"50\%", r"0.5 = 50\%"),
    ("1", r"60 \text{ min} = 1 \text{ hour}"),
    ("4210_5", "4210_{5}"),
    (r"4210_{5}", "4210"),
    # percent
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("50", r"50\%"),
    ("0.5", "50%"),
    (r"\frac{1}{3}", r"\frac{100}{3}\%"),
    # units, degrees
    ("5", r"5\text{ cm}"),
    (r"10\text{ cm}^2", "10"),
    ("12", "12 cm^2"),
    ("18", "18 dollars"),
    ("45", r"45^\circ"),
    (r"45^{\circ}", "45°"),
    (r"3\text{ km}", "3 kilometers"),
    ("60", "60 km/h"),
    (r"60\text{ mph}", "60 miles per hour"),
    (r"5\text{ m}", r"5\mathrm{m}"),
    (r"7\pi", r"7\pi cm^2"),
    (r"28\pi", "28\\pi square units"),
    ("3", "3 books"),
    (r"20\text{ apples}", "20"),
    ("20", r"20\text{ red apples}"),
    ("1024", r"2^{10} \text{ ways}"),
    (r"7\sqrt{2}", r"7\sqrt{2} \text{ apples}"),
    ("2", "2 real roots"),
    ("10", r"10\text{th}"),
    ("60", r"60 \text{ miles}/\text{hour}"),
    (r"3\pi h", r"3h\pi"),  # letters after a number are factors, whatever unit they could be
    # sets, lists, intervals
    (r"\{1,2,3\}", r"\{3, 2, 1\}"),
    ("1,2", "2, 1"),
    (r"\pm 2", "-2, 2"),
    ("2,3", r"x=2 \text{ or } x=3"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("[-2,7]", r"-2 \le x \le 7"),
    ("[-2,7]", r"\{x : -2 \le x \le 7\}"),
    (r"(2,\infty)", r"\left\{x \in \mathbb{R} \mid x > 2\right\}"),
    ("(0,1)", "]0,1["),
    (r"\emptyset", r"\varnothing"),
    (r"(-\infty,3)\cup(5,\infty)", r"(5,\infty)\cup(-\infty,3)"),
    # tuples, matrices
    (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
    ("(100,200)", "(100, 200)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    # expressions
    ("5", "x=5"),
    ("y=2x+1", "2x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("1500", r"1.5\times 10^3"),
    ("6-5i", "-5i + 6"),
    # text, choices
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{two  sides}", "Two sides"),
    (r"\text{June 20}", "June 20"),
    (r"-\text{5}", "-5"),
    ("B", r"\text{(B)}"),
    (r"\text{(C)}", "c."),
    ("A", r"\textbf{(A)} 12"),
    ("A", "A. twelve"),
    ("(A)", "option A"),
]
OTHER = [
    ("42", "43"),
    ("42", ""),
    ("50", "0.5"),
    (r"50\%", r"0.5\%"),
    ("5", r"\frac{5}{100}"),
    (r"\frac13", "0.333"),
    (r"\frac13", "0.33333"),
    (r"\frac13", "-0.333333"),
    (r"\frac{1}{3}", "0.333334"),
    ("1", "0.999996"),
    ("0", "0.0000001"),
    ("1000001", "1000000.0"),  # an integer is stated with all its digits
    (r"5\text{ cm}", "5 m e t e r s"),
    ("5 cm", "5 meters"),
    (r"5\text{ m}", r"5\text{ km}"),
    ("60 km/h", "60 mph"),
    ("3", "3 million"),
    ("3", "3 dozen eggs"),
    ("3", "3 millions"),
    ("6", "6 tenths"),
    # text is part of an answer: what it says counts as it does without \text
    ("3", r"3 \text{ million}"),
    ("3", r"3 \mathrm{million}"),
    ("3", r"3 \textnormal{ million}"),
    ("3", r"3 \text{ {million}}"),
    ("3", r"3\text{ dozen eggs}"),
    (r"\frac{1}{2}", r"\frac{1}{2}\text{ dozen}"),
    (r"7\sqrt{2}", r"7\sqrt{2}\text{ million}"),
    ("10", r"10 \text{ minutes and } 5 \text{ seconds}"),
    ("3", r"3 \text{ h } 20 \text{ min}"),
    ("6.5", r"6 \text{ ft } 1/2 \text{ in}"),
    ("12", r"12 \text{ factorial}"),
    ("3", r"3\text{k}"),
    ("2", r"2\text{x}"),
    ("5", r"5 \text{ or more}"),
    (r"\text{June 20}", "June 21"),
    (r"\text{June 20}", "20"),
    (r"\text{Lane 3}", r"\text{Lean 3}"),  # the same letters
    ("3", "3 $ million"),
    # nor is a factor a thing that is counted, or a unit
    ("12", "12 xy"),
    ("12", r"12 \text{ xy}"),
    ("12", "12t"),
    ("12", "12 ab"),
    ("x+2", "x+2c"),
    # numbers that differ are not the same by being said to be
    ("11", r"11 \approx 12"),
    ("12", r"11 \approx 12"),
    ("7", r"8 \text{ cm} = 7 \text{ cm}"),
    ("11", "11 ≈ 12"),
    ("11", r"11 \approx 11.4"),
    ("8", "8=7"),
    ("7", "8=7"),
    ("7", "x = 8 = 7"),
    ("12", r"11 ~= 12"),
    ("11/2", "1 1/2"),
    ("1/2", "1 1/2"),
    ("1250", "12 500/5"),
    ("11", r"11{:}30"),
    ("12:30", "12:31"),
    ("1", "1{.}5"),
    ("5", "1{.}5"),
    ("4210_5", "4210_6"),
    (r"0.\overline{3}", "0.333"),
    ("[0,1]", "]0,1["),
    (r"\{1,2\}", r"\{x : x > 1\}"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    ("1,2", "1,3"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("x+1", "x-1"),
    ("2xy", "2"),
    (r"\text{Evelyn}", "Evenly"),  # the same letters
    ("even", "odd"),
    ("B", "D"),
    ("A", "(A) or (B)"),
    ("A", "(B) A"),
    (r"\text{(B)}", r"\text{(B)}+1"),
    ("A", "B. twelve"),
    ("1", "1" * 5000),
    (r"\frac{1}{0}", "1"),
    ("0.0000001", "0.0"),
    # more than one answer is none
    ("7", r"\text{7 or 8}"),
    ("7", r"7 \text{ or } 8"),
    ("7", "7 or 8"),
    ("7", "7, 8"),
    ("7", "8; 7"),
    ("7", r"8 \quad 7"),
    ("7", r"x=8 \text{ or } x=7"),
    ("7", r"\{7, 8\}"),
    (r"\sqrt{2}", r"\sqrt{3} \text{ or } \sqrt{2}"),
]


def verdicts(pairs):
    async def ask():
        return await asyncio.gather(*(same_answer(*pair) for pair in pairs))

    return asyncio.run(ask())


def test_same_answers():
    assert [pair for pair, same in zip(SAME, verdicts(SAME), strict=True) if not same] == []


def test_other_answers():
    assert [pair for pair, same in zip(OTHER, verdicts(OTHER), strict=True) if same] == []


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_whole_numbers_are_the_same_when_they_are_equal_however_they_are_written(a, b):
    for written in (str(b), f"{b:,}", rf"\boxed{{{b}}}"[7:-1], f"{b}.0", f"${b}$"):
        assert settle(str(a), written) is (a == b)


def rounded(value, digits):
    """A positive fraction with so many significant digits, written without an exponent."""
    return f"{Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator)):f}"


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.sampled_from(["", "-"]), st.integers(6, 12))
def test_a_fraction_is_its_rounding_to_six_digits_or_more_and_no_other_to_four(top, bottom, sign, digits):
    value, gold = Fraction(top, bottom), rf"{sign}\frac{{{top}}}{{{bottom}}}"
    enough, short = (sign + rounded(value, n) for n in (digits, 4))
    for one, other in ((gold, enough), (enough, gold)):
        assert settle(one, other) is True
    # between them a rounding to four digits may be one to six by chance, as 0.30000 is of 0.300000001
    if abs(Fraction(short)) != Fraction(rounded(value, 6)):
        assert settle(gold, short) is settle(short, gold) is False


decimals = st.decimals("-2", "2", allow_nan=False, places=7).map(lambda one: f"{one:f}")


@given(decimals, decimals)
def test_which_side_a_decimal_number_stands_on_decides_nothing(one, other):
    assert settle(one, other) is settle(other, one)


@given(st.text(max_size=60))
def test_no_text_makes_it_raise(text):
    assert settle("7", text) in (True, False, None)
    assert settle(text, text) is bool(text.strip())


def test_what_a_task_may_ask_is_known_before_it_is_asked():
    async def ask():
        return [await is_checkable(gold) for gold in ("4", "Evelyn", r"\frac{\pi}{2}", r"\{1,2\}", r"\frac{", "")]

    assert asyncio.run(ask()) == [True, True, True, True, False, False]


NEVER_ENDS = ["9^{9^{9^9}}", "(" * 30 + r"\sum_{n=1}^{10^9} \sqrt{n}" + ")" * 30, r"10^{10^{10}}!"]


def test_answers_that_never_end_count_as_wrong_and_hold_up_nobody(monkeypatch):
    """Neither those that are asked about in the meantime, nor those that come after."""

    async def ask():
        began = time.perf_counter()
        stalled = [asyncio.create_task(same_answer("7", answer)) for answer in NEVER_ENDS]
        quick = [await same_answer("7", "7"), await same_answer("7", "8")]
        assert not any(task.done() for task in stalled)  # nothing of theirs waits for a process
        with monkeypatch.context() as patch:
            patch.setattr(equality, "WALL_SECONDS", 1.0)
            verdicts = await asyncio.gather(*stalled)
        assert time.perf_counter() - began < 60
        return quick, verdicts, await same_answer(r"\sqrt{8}", r"2\sqrt{2}")

    assert asyncio.run(ask()) == ([True, False], [False] * len(NEVER_ENDS), True)


@pytest.mark.parametrize("answer", ["1" + " " * 1500 + "abc def", "1=" * 999 + "1", "5 min/" * 300, "1" * 2000])
def test_a_long_answer_is_settled_while_nobody_notices(answer):
    """In the event loop of all rollouts; the length is below the limit."""
    began = time.process_time()
    settle("7", answer)
    assert time.process_time() - began < 0.5


def test_what_no_parser_should_see_is_wrong_at_once():
    """As the text is: neither the length nor the depth of an answer reaches a process."""
    assert settle("7", "(" * 400 + "1" + ")" * 400) is False and settle("7", "x" * 5000) is False
    assert settle("7", "9^9^9^9") is None  # a parser's to decide, and quickly


class _Ending:
    """A process that ends like this, and then like that."""

    def __init__(self, *ends: Exception | tuple[bool, bool]) -> None:
        self.ends = list(ends)

    def __call__(self) -> _Ending:
        return self

    async def call(self, *args, seconds):
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


DIED, STALLED = equality.ProcessExpired("killed for its memory"), TimeoutError("not done after 4 s")
RIGHT, TOO_LONG = (True, True), (False, False)  # what the process says
ONCE = [  # how the processes end, the verdict, how many were asked
    ([DIED, RIGHT], True, 2),
    ([STALLED, RIGHT], True, 2),
    ([DIED, DIED], False, 2),
    ([STALLED, STALLED], False, 2),
    ([TOO_LONG, RIGHT], False, 1),  # by the answer's own CPU seconds, or its memory
]


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(equality, "_verdicts", OrderedDict())


@pytest.mark.parametrize(("ends", "verdict", "asked"), ONCE)
def test_a_process_that_fails_is_asked_again_once(nothing_known, monkeypatch, ends, verdict, asked):
    processes = _Ending(*ends)
    monkeypatch.setattr(equality, "_processes", processes)
    assert asyncio.run(same_answer("x", "y+1")) is verdict
    assert len(processes.ends) == len(ends) - asked


@pytest.mark.parametrize("ends", [[DIED, DIED], [STALLED, DIED], [DIED, STALLED]])
def test_an_answer_whose_process_died_is_compared_anew_the_next_time(nothing_known, monkeypatch, ends):
    monkeypatch.setattr(equality, "_processes", _Ending(*ends, RIGHT))
    assert [asyncio.run(same_answer("x", "y+1")) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("ends", [[STALLED, STALLED], [TOO_LONG]])
def test_an_answer_that_stalls_costs_its_seconds_in_one_rollout_only(nothing_known, monkeypatch, ends):
    monkeypatch.setattr(equality, "_processes", _Ending(*ends))
    assert [asyncio.run(same_answer("x", "y+1")) for _ in range(8)] == [False] * 8
