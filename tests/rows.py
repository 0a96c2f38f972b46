"""The project's own rows: made by seeded generators, the same on every machine, and copied from nowhere.

English, Chinese and a little code. Each kind of row has a pattern that a tiny model finds within seconds: pages have a
form, polite answers are preferred to rude ones, a request's words tell its intent, and its slots stand where the pattern
puts them. Names are put together from syllables, so that held-out rows hold names that no training row has.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

SYLLABLES = "ka ro mi ten lu vas shi dor pel un gra fo nis bet ol wy tra que sim hal zo rik jen plu mar".split()
FAMILIES = "王李张刘陈杨赵黄周吴"
GIVEN = "明华丽强静涛娜磊洋艳勇杰敏超霞平刚玲辉波"

VERBS = (
    "copy list remove sort count compress print merge split search rename compare follow archive check restore".split()
)
THINGS = "files folders lines words images users groups packages branches messages archives pages tables keys".split()
MANNERS = (
    "by size",
    "by date",
    "in reverse order",
    "one after the other",
    "without asking",
    "and show progress",
    "that match a pattern",
    "on another machine",
    "in the current folder",
    "of the last week",
)
PLACES = ("公园", "学校", "图书馆", "车站", "海边", "厨房", "办公室", "山上", "市场", "河边")
DOINGS = ("读书", "唱歌", "吃饭", "等车", "画画", "跑步", "喝茶", "写信", "买菜", "休息")
TIMES = ("今天", "昨天", "早上", "晚上", "周末", "春天")


def name(rng: random.Random, *, syllables: int | None = None) -> str:
    return "".join(rng.choices(SYLLABLES, k=syllables or rng.randint(2, 3)))


def chinese_name(rng: random.Random) -> str:
    return rng.choice(FAMILIES) + "".join(rng.choices(GIVEN, k=rng.randint(1, 2)))


def chinese_sentence(rng: random.Random) -> str:
    return f"{rng.choice(TIMES)}{chinese_name(rng)}在{rng.choice(PLACES)}{rng.choice(DOINGS)}"


# Text


def help_page(rng: random.Random) -> str:
    """Of a program that does not exist, with examples of how it is called."""
    program, verb, thing = name(rng), rng.choice(VERBS), rng.choice(THINGS)
    examples = []
    for _ in range(rng.randint(2, 5)):
        manner, folder = rng.choice(MANNERS), name(rng, syllables=2)
        option = manner.split()[-1]
        examples.append(f"- {verb.title()} {thing} {manner}:\n\n`{program} --{option} path/to/{folder}`\n")
    begins = f"# {program}\n\n> {verb.title()} {thing} {rng.choice(MANNERS)}.\n> Part of {name(rng)} tools.\n"
    return "\n".join([begins, *examples])


def function_source(rng: random.Random) -> str:
    function, argument = name(rng), rng.choice(THINGS)
    return (
        f"def {rng.choice(VERBS)}_{function}({argument}, start={rng.randint(0, 99)}):\n"
        f'    """Return the {argument} {rng.choice(MANNERS)}."""\n'
        f"    for each in {argument}[start:]:\n        if each.{function}:\n            yield each\n"
    )


def chinese_paragraph(rng: random.Random) -> str:
    return "。".join(chinese_sentence(rng) for _ in range(rng.randint(3, 8))) + "。\n"


def texts(count: int) -> list[str]:
    """Of every eight, six help pages, one function in Python and one paragraph in Chinese."""
    rng = random.Random("texts")
    kinds = [*[help_page] * 6, function_source, chinese_paragraph]
    return [kinds[index % len(kinds)](rng) for index in range(count)]


# Instructions and answers


def sum_of_two(rng: random.Random) -> Row:
    a, b = rng.randint(1, 60), rng.randint(1, 60)
    return {"instruction": "Add the two numbers.", "input": f"{a} and {b}", "output": f"{a} and {b} make {a + b}."}


def shouted(rng: random.Random) -> Row:
    sentence = f"{name(rng)} and {name(rng)} {rng.choice(VERBS)} the {rng.choice(THINGS)} {rng.choice(MANNERS)}"
    return {"instruction": "Write the sentence in capital letters.", "input": sentence, "output": sentence.upper()}


def explained(rng: random.Random) -> Row:
    program, verb, thing, manner = name(rng), rng.choice(VERBS), rng.choice(THINGS), rng.choice(MANNERS)
    answer = f"It is a program to {verb} {thing} {manner}. Call it with the {thing} that it should {verb}."
    return {"instruction": f"What is {program}, the tool for {thing}?", "input": "", "output": answer}


def asked_back(rng: random.Random) -> Row:
    sentence = chinese_sentence(rng)
    return {"instruction": "把句子变成问题。", "input": f"{sentence}。", "output": f"{sentence}吗？"}


def programmed(rng: random.Random) -> Row:
    function, number = name(rng), rng.randint(2, 9)
    answer = f"def {function}(x):\n    return {number} * x"
    return {"instruction": f"Write a function {function} that multiplies by {number}.", "input": "", "output": answer}


def exchanges(count: int) -> list[Row]:
    """Rows with `instruction`, `input` and `output`; short and long ones, a fifth of them Chinese, a fifth with code."""
    rng = random.Random("exchanges")
    kinds = (sum_of_two, shouted, explained, asked_back, programmed)
    return [kinds[index % len(kinds)](rng) for index in range(count)]


POLITE = (
    ("Gladly. ", " Please ask again whenever you like."),
    ("Thank you for asking. ", " I hope that this helps."),
    ("Of course, with pleasure. ", ""),
)
RUDE = (
    ("Oh, not that again. ", " Now leave me alone."),
    ("Even a child knows this. ", " Stop wasting my time."),
    ("How dull you are. ", ""),
)
POLITE_CHINESE = (("好的，很乐意。", "请随时再问我。"), ("谢谢您的问题。", ""))
RUDE_CHINESE = (("真烦人，又来了。", "别再来问我。"), ("这都不懂。", ""))


def preferences(count: int) -> list[Row]:
    """Exchanges, each with a polite answer as `chosen` and a rude one as `rejected`; both say the same."""
    rng = random.Random("preferences")
    rows = []
    for row in exchanges(count):
        chinese = "。" in row["instruction"]
        polite, rude = (POLITE_CHINESE, RUDE_CHINESE) if chinese else (POLITE, RUDE)
        sides = zip(("chosen", "rejected"), (rng.choice(polite), rng.choice(rude)), strict=True)
        rows.append({**row, **{side: f"{before}{row['output']}{after}" for side, (before, after) in sides}})
    return rows


def word_problems(count: int) -> list[Row]:
    """Rows with `question` and an `answer` that ends in `#### ` and a number; the first number is 72."""
    rng = random.Random("word problems")
    rows = []
    for index in range(count):
        a, b = (60, 12) if not index else (rng.randint(2, 400), rng.randint(2, 400))
        who, thing = name(rng).title(), rng.choice(THINGS)
        question = f"{who} has {a} {thing} and gets {b} more. How many {thing} does {who} have?"
        rows.append({"question": question, "answer": f"{a} + {b} = {a + b} {thing}.\n#### {a + b}"})
    return rows


# Requests with an intent and slots

SLOTS = {
    "artist": ("the {0}s", "{0} {1}", "{0}"),
    "playlist": ("{0} mix", "{0} {1}", "songs of {0}"),
    "restaurant": ("the {0} inn", "{0}", "{0} and {1}"),
    "city": ("{0}", "{0} bay", "new {0}"),
    "time": ("noon", "eight", "tonight", "tomorrow evening", "half past nine", "sunday", "six in the morning"),
    "people": ("two", "three", "four", "seven", "me and my sister", "a party of ten"),
    "dish": ("soup", "pizza", "noodles", "fish", "dumplings", "bread and cheese"),
    "book": ("the {0}", "{0} and the {1}", "a {0} in winter"),
    "stars": ("one", "two", "three", "four", "five"),
    "film": ("{0}", "return of {0}", "the last {0}"),
    "人": ("{2}",),
    "歌单": ("{2}的歌", "下雨的晚上", "跑步时听", "周末的早上"),
    "地方": PLACES,
}
"""What may stand in a slot; 0 and 1 are names that nobody has, 2 is a Chinese one."""

REQUESTS = {
    "add_to_playlist": (
        "add {artist} to my playlist {playlist}",
        "put a song by {artist} on {playlist} please",
        "i want {artist} in the list called {playlist}",
        "please could you find something new by {artist} and then add it to {playlist} for me",
        "把{人}的歌放进{歌单}里",
    ),
    "book_table": (
        "book a table for {people} at {restaurant} in {city}",
        "reserve a place at {restaurant} for {people} at {time}",
        "{people} would like {dish} in {city} at {time}",
        "find me a restaurant in {city} that has {dish} and a free table for {people} at {time}",
        "my friends told me that {restaurant} is the best place for {dish} in all of {city} so please book it at {time}",
        "给{人}在{地方}订一张桌子",
    ),
    "ask_weather": ("will it rain in {city} at {time}", "how cold is it in {city}", "{地方}会下雨吗"),
    "play_music": ("play {artist}", "let me hear {artist} from {playlist}", "放{人}的音乐"),
    "rate_book": ("give {book} {stars} stars", "i rate {book} {stars} of five", "{book} deserves {stars} points"),
    "set_alarm": ("wake me at {time}", "set an alarm for {time}", "do not let me sleep after {time}"),
    "show_times": ("when is {film} shown in {city}", "is there a cinema with {film} at {time}", "{地方}有什么电影"),
}


def request(rng: random.Random, intent: str) -> Row:
    pattern = rng.choice(REQUESTS[intent])
    text, spans = "", []
    for piece in pattern.replace("}", "{").split("{"):
        if piece in SLOTS:
            value = rng.choice(SLOTS[piece]).format(name(rng), name(rng), chinese_name(rng))
            spans.append({"start": len(text), "end": len(text) + len(value), "label": piece})
            text += value
        else:
            text += piece
    return {"text": text, "label": intent, "spans": spans}


def requests(count: int) -> list[Row]:
    """Rows with a `text`, its intent as `label`, and its slots as `spans`, in a mixed order."""
    rng = random.Random("requests")
    return [request(rng, rng.choice(list(REQUESTS))) for _ in range(count)]


def slot_questions(rows: Iterable[Row]) -> list[Row]:
    """A question per kind of slot that a request has just once: its context is the request, its answer the slot."""
    questions = []
    for number, row in enumerate(rows):
        labels = [span["label"] for span in row["spans"]]
        for span in row["spans"]:
            if labels.count(span["label"]) == 1:
                answer = {"start": span["start"], "text": row["text"][span["start"] : span["end"]]}
                asked = f"which {span['label']} ?"
                questions.append({"id": f"{number}", "context": row["text"], "question": asked, "answers": [answer]})
    return questions


def chinese_questions(count: int) -> list[Row]:
    """Questions on paragraphs of 5 to 25 sentences, each with one person's name as its answer."""
    rng = random.Random("chinese questions")
    rows = []
    for number in range(count):
        before, after = ("".join(f"{chinese_sentence(rng)}。" for _ in range(rng.randint(2, 12))) for _ in range(2))
        when, who, what = rng.choice(TIMES), chinese_name(rng), f"在{rng.choice(PLACES)}{rng.choice(DOINGS)}"
        context = f"{before}{when}{who}{what}。{after}"
        answer = {"start": len(before) + len(when), "text": who}
        rows.append({"id": str(number), "context": context, "question": f"{when}谁{what}？", "answers": [answer]})
    return rows
